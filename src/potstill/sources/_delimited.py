"""Records of CSV and TSV files, read strictly: what two programs could read in two ways is refused with its place."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from potstill.core.errors import UserError
from potstill.sources._cells import Row, shown
from potstill.sources._files import open_text

SNIFFED = (",", ";", "\t", "|")
_WRITTEN = {"\t": "a tab"}


@dataclass(frozen=True)
class Form:
    """How a file is written.

    Attributes:
        delimiter: between fields; None: told from the header.
        quote: around fields that hold delimiters, line ends or quotes (then doubled); empty: quotes are plain characters.
    """

    delimiter: str | None = None
    quote: str = '"'


def read_delimited(path: str, form: Form, names: Iterable[str] = ()) -> Iterator[tuple[str, Row]]:
    """Each record with its place, `file:line` of its first line, as texts by the names of the first line.

    Columns without a name, as an index has, are left out.

    Args:
        names: columns that the header should have; they decide between delimiters that could both be meant.

    Raises:
        UserError: as `open_text`; or names file, line and column of what is not UTF-8, of a quotation mark out of place, of a
            record with more or fewer fields than the header or equal to it, and of two columns with one name.
    """
    with open_text(path) as file:
        lines = _decoded(file, path)
        first = next((line for line in lines if line[1].strip("\r\n")), None)
        if first is None:
            raise UserError(f"{path}: has no rows; write the names of the columns in the first line, and one record per line")
        if first[1].startswith('{"') and first[1].rstrip().endswith("}"):
            raise UserError(f'{path}: holds JSON objects; set data.kind = "jsonl"')
        form = Form(form.delimiter or _delimiter(first, form, names, path), form.quote)
        records = _records(chain([first], lines), form, path)
        header = next(records)
        _check_names(header, path)
        record = None
        for record in records:
            if len(record.fields) != len(header.fields):
                raise _uneven(record, header, form, path)
            if record.fields == header.fields:  # of files that were joined by `cat`
                raise UserError(f"{path}:{record.first}: repeats the header; take the line out")
            yield (
                f"{path}:{record.first}",
                {name: cell for name, cell in zip(header.fields, record.fields, strict=True) if name},
            )
    if record is None:
        raise UserError(f"{path}: has no rows below its header ({shown(header.fields)}); write one record per line")


@dataclass
class _Record:
    """Fields that are read line by line, because a quoted field can hold line ends.

    Attributes:
        first, last: its lines, counted from 1.
        fields: read so far.
        parts: of the quoted field that is open; None outside of quotes.
        opened: line and column of its opening quote.
    """

    form: Form
    path: str
    first: int
    last: int = 0
    fields: list[str] = field(default_factory=list)
    parts: list[str] | None = None
    opened: tuple[int, int] = (0, 0)

    def take(self, number: int, line: str) -> bool:
        """Read a line on; whether the record ends with it."""
        self.last = number
        body = line.removesuffix("\n").removesuffix("\r")
        at = 0
        while True:
            if self.parts is not None:
                at = self._quoted(line, at)
                if at < 0:
                    return False
                if self.parts is not None:
                    continue
                if at >= len(body):
                    return True
                if body[at] != self.form.delimiter:
                    raise self._misplaced(number, at, "text follows the quotation mark that closes a field")
                at += 1
            elif self.form.quote and body.startswith(self.form.quote, at):
                self.parts, self.opened = [], (number, at + 1)
                at += 1
            else:
                end = self._plain(number, body, at)
                if end < 0:
                    return True
                at = end + 1

    def _quoted(self, line: str, at: int) -> int:
        """Read inside quotes up to the next quotation mark; where reading goes on, or -1 on the next line."""
        assert self.parts is not None
        quote = self.form.quote
        end = line.find(quote, at)
        if end < 0:
            self.parts.append(line[at:])
            return -1
        self.parts.append(line[at:end])
        if line.startswith(quote, end + 1):
            self.parts.append(quote)
            return end + 2
        self.fields.append("".join(self.parts))
        self.parts = None
        return end + 1

    def _plain(self, number: int, body: str, at: int) -> int:
        """Read a field without quotes; where its delimiter is, or -1 at the end of the line."""
        assert self.form.delimiter
        end = body.find(self.form.delimiter, at)
        cell = body[at:] if end < 0 else body[at:end]
        if self.form.quote and (inside := cell.find(self.form.quote)) >= 0:
            raise self._misplaced(number, at + inside, "a quotation mark stands inside a field that does not begin with one")
        if (inside := cell.find("\r")) >= 0:
            raise UserError(
                f"{self.path}:{number}: column {at + inside + 1}: a carriage return without a line feed; save the file with "
                "line ends LF or CRLF"
            )
        self.fields.append(cell)
        return end

    def _misplaced(self, number: int, at: int, told: str) -> UserError:
        quote = self.form.quote
        begun = "" if self.first == number else f" (the record begins in line {self.first})"
        return UserError(
            f"{self.path}:{number}: column {at + 1}: {told}{begun}; write {quote * 2} for a quotation mark, and {quote} around "
            'the whole field without spaces; or set data.quote = "none" where quotation marks are plain characters'
        )


def _records(lines: Iterable[tuple[int, str]], form: Form, path: str) -> Iterator[_Record]:
    """Each record; empty lines between records are passed over."""
    record = None
    for number, line in lines:
        if record is None:
            if not line.strip("\r\n"):
                continue
            record = _Record(form, path, number)
        if record.take(number, line):
            yield record
            record = None
    if record is not None:
        line, at = record.opened
        raise UserError(f"{path}:{line}: column {at}: the quotation mark that begins a field here is never closed; close it")


def _decoded(lines: Iterable[bytes], path: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, 1):
        try:
            text = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode()
        except UnicodeDecodeError as error:
            told = f"not UTF-8 (byte 0x{error.object[error.start]:02x} in column {error.start + 1})"
            raise UserError(f"{path}:{number}: {told}; save the file as UTF-8") from None
        if "\0" in text:
            raise UserError(f"{path}:{number}: column {text.index(chr(0)) + 1}: a NUL character; save the file as UTF-8 text")
        yield number, text


def _delimiter(first: tuple[int, str], form: Form, names: Iterable[str], path: str) -> str:
    """The delimiter of a header: the only one that cuts it, or the only one that finds the names in it.

    Raises:
        UserError: two would do.
    """
    cut = {each: fields for each in SNIFFED if len(fields := _fields(first, Form(each, form.quote), path)) > 1}
    if len(cut) > 1:
        named = [each for each, fields in cut.items() if set(names) <= set(fields)]
        if len(named) != 1:
            several = " or ".join(_WRITTEN.get(each, f"'{each}'") for each in cut)
            raise UserError(f"{path}:{first[0]}: the header can be cut at {several}; set data.delimiter")
        return named[0]
    return next(iter(cut), SNIFFED[0])


def _fields(line: tuple[int, str], form: Form, path: str) -> list[str]:
    record = _Record(form, path, line[0])
    try:
        record.take(*line)
    except UserError:  # not written with this delimiter
        return []
    return record.fields


def _check_names(header: _Record, path: str) -> None:
    names = [name for name in header.fields if name]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}:{header.first}: two columns are named '{twice}'; rename one of them")


def _uneven(record: _Record, header: _Record, form: Form, path: str) -> UserError:
    assert form.delimiter
    several = record.last > record.first
    where = f" in lines {record.first} to {record.last}, and perhaps a quotation mark that is not closed" if several else ""
    count = f"{len(record.fields)} field" + "s" * (len(record.fields) != 1)
    sign = _WRITTEN.get(form.delimiter, f"'{form.delimiter}'")
    quotes = f"; put {form.quote} around a field that holds {sign}" if form.quote else f"; no field can hold {sign}"
    return UserError(
        f"{path}:{record.first}: {count}{where}; the header has {len(header.fields)} ({shown(header.fields)}){quotes}"
    )
