"""CSV and TSV: what is read, and the exact words for what could be read in two ways."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from potstill.core.errors import UserError
from potstill.sources.csv import Csv

HEADER = "instruction,response\n"
QUOTES = (
    'write "" for a quotation mark, and " around the whole field without spaces; '
    'or set data.quote = "none" where quotation marks are plain characters'
)
COMMA = "put \" around a field that holds ','"
NUMBER = "column 'w' weights the rows and must hold a number of 0 or more"


def pairs(folder: Path, content: str | bytes, name: str = "rows.csv", **fields: Any) -> list[tuple[str, str]]:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(row.instruction, row.response) for row in Csv(path=str(file), **fields).rows()]


@pytest.mark.parametrize(
    "content",
    [
        HEADER + "a,b\nc,d\n",
        HEADER + "a,b\r\n\r\nc,d",
        "\ufeff" + HEADER + "a,b\nc,d\n",
        '"instruction","response"\n"a","b"\n"c","d"\n',
        "instruction;response\na;b\nc;d\n",
        "instruction\tresponse\na\tb\nc\td\n",
        "instruction|response\na|b\nc|d\n",
        ",instruction,response,\n0,a,b,\n1,c,d,\n",  # an index, and a delimiter at the end
    ],
)
def test_what_people_write(content: str, tmp_path: Path) -> None:
    assert pairs(tmp_path, content) == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize("name", ["rows.tsv", "rows.TAB", "rows.tsv.gz"])
def test_a_file_named_tsv_is_cut_at_tabs(name: str, tmp_path: Path) -> None:
    assert pairs(tmp_path, "instruction\tresponse\tone,two\na\tb\t1,2\n", name) == [("a", "b")]


def test_the_header_decides_by_the_columns_that_are_asked_for(tmp_path: Path) -> None:
    content = "question;answer;notes, long\na,b;c;d\n"
    assert pairs(tmp_path, content, instruction="question", response="answer") == [("a,b", "c")]


def test_cells_are_text_as_they_stand(tmp_path: Path) -> None:
    content = HEADER + ' NA ,007\n"a, ""b""\r\nc",\'null\n1e5,"  "\n'
    assert pairs(tmp_path, content) == [(" NA ", "007"), ('a, "b"\r\nc', "'null")]


def test_quotation_marks_can_be_plain_characters(tmp_path: Path) -> None:
    assert pairs(tmp_path, 'instruction\tresponse\n5" pipe\t"a\n', quote="none") == [('5" pipe', '"a')]
    assert pairs(tmp_path, "instruction,response\n'a, b',\"c\n", quote="'") == [("a, b", '"c')]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a,b,c\n", f":2: 3 fields; the header has 2 (instruction, response); {COMMA}"),
        ("a,b\n\nc\n", f":4: 1 field; the header has 2 (instruction, response); {COMMA}"),
        (
            '"a\nb",c,d\n',
            ":2: 3 fields in lines 2 to 3, and perhaps a quotation mark that is not closed; "
            f"the header has 2 (instruction, response); {COMMA}",
        ),
        ('x,"a\nb,c\n', ":2: column 3: the quotation mark that begins a field here is never closed; close it"),
        (
            '"a,b\nc,"d"\n',
            f":3: column 4: text follows the quotation mark that closes a field (the record begins in line 2); {QUOTES}",
        ),
        ('"a"b,c\n', f":2: column 4: text follows the quotation mark that closes a field; {QUOTES}"),
        ('"a" ,c\n', f":2: column 4: text follows the quotation mark that closes a field; {QUOTES}"),
        ('a, "b"\n', f":2: column 4: a quotation mark stands inside a field that does not begin with one; {QUOTES}"),
        ('5" pipe,b\n', f":2: column 2: a quotation mark stands inside a field that does not begin with one; {QUOTES}"),
        ("a,b\rc,d\n", ":2: column 4: a carriage return without a line feed; save the file with line ends LF or CRLF"),
        ("a\0,b\n", ":2: column 2: a NUL character; save the file as UTF-8 text"),
        ("a,b\ninstruction,response\n", ":3: repeats the header; take the line out"),
        ("", ": has no rows below its header (instruction, response); write one record per line"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(content: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        pairs(tmp_path, HEADER + content)
    assert str(caught.value) == f"{tmp_path / 'rows.csv'}{told}"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", ": has no rows; write the names of the columns in the first line, and one record per line"),
        ("\n\n", ": has no rows; write the names of the columns in the first line, and one record per line"),
        ("a,b;c\nd,e;f\n", ":1: the header can be cut at ',' or ';'; set data.delimiter"),
        ("a\tb,c\nd\te,f\n", ":1: the header can be cut at ',' or a tab; set data.delimiter"),
        ("instruction,response,x,x\na,b,c,d\n", ":1: two columns are named 'x'; rename one of them"),
        (
            "Wer?,Ann\nWo?,Lima\n",
            ":2: no column 'instruction' (columns: Wer?, Ann); say by data.instruction which of them it is",
        ),
        (HEADER.encode() + b"\xe9,b\n", ":2: not UTF-8 (byte 0xe9 in column 1); save the file as UTF-8"),
        (HEADER.encode("utf-16"), ": is UTF-16 text; save the file as UTF-8"),
        (HEADER.encode("utf-16-le"), ":1: column 2: a NUL character; save the file as UTF-8 text"),
        (b"PK\x03\x04", ": is a zip archive, as Excel's .xlsx files are; unzip it, or save the sheet as CSV"),
        (b"PAR1....", ': is a Parquet file; set data.kind = "parquet"'),
        ('{"instruction": "a", "response": "b"}\n', ': holds JSON objects; set data.kind = "jsonl"'),
        (b"\x04\x22\x4d\x18", ": is compressed with LZ4; decompress it with `lz4 -d`"),
        (b"x" * 257 + b"ustar", ": is a tar archive; unpack it and name one file of it"),
    ],
)
def test_files_that_are_something_else(content: str | bytes, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        pairs(tmp_path, content)
    assert str(caught.value) == f"{tmp_path / 'rows.csv'}{told}"


@pytest.mark.parametrize(("cell", "weight"), [("2", 2.0), ("0.5", 0.5), (" 1e-1 ", 0.1), ("0", 0.0), (".5", 0.5)])
def test_a_weight_is_read_as_a_number(cell: str, weight: float, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f"instruction,response,w\na,b,{cell}\n")
    assert [row.weight for row in Csv(path=str(file), weight="w").rows()] == [weight]


@pytest.mark.parametrize("cell", ["", "-1", "nan", "inf", '"0,5"', "1_0", "two", "0x1"])
def test_a_weight_that_is_no_number(cell: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        pairs(tmp_path, f"instruction,response,w\na,b,{cell}\n", weight="w")
    assert str(caught.value) == f"{tmp_path / 'rows.csv'}:2: {NUMBER}"


def test_a_list_in_a_cell_is_json(tmp_path: Path) -> None:
    told = 'column \'refs\' holds text, not a list of texts; write it as ["one", "two"]'
    with pytest.raises(UserError) as caught:
        pairs(tmp_path, "instruction,response,refs\na,b,\"['x', 'y']\"\n", references="refs")
    assert str(caught.value) == f"{tmp_path / 'rows.csv'}:2: {told}"


@pytest.mark.parametrize("delimiter", ["", ",,", '"', "\n"])
def test_a_delimiter_is_one_character(delimiter: str) -> None:
    with pytest.raises(ValidationError):
        Csv(path="rows.csv", delimiter=delimiter)


def test_delimiter_and_quote_differ() -> None:
    with pytest.raises(ValidationError, match="delimiter and quote are both '; choose two characters"):
        Csv(path="rows.csv", delimiter="'", quote="'")
