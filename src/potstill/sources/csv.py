"""Any CSV or TSV file."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from potstill.sources._cells import Row, with_number
from potstill.sources._columns import FileColumns
from potstill.sources._delimited import Form, read_delimited
from potstill.sources._files import bare_name


class Csv(FileColumns, kind="csv"):
    """A header and one record per line of a local CSV or TSV file, UTF-8, perhaps compressed; columns are named by fields.

    Read strictly, as RFC 4180 writes it: a quotation mark belongs around a whole field, or doubled inside of one. All cells
    are text, empty ones the empty text; the column of `weight` holds numbers, those of lists hold JSON.

    Raises:
        UserError: names the file, the line and the column of what is missing or can be read in two ways.
    """

    delimiter: str | None = Field(
        default=None,
        pattern='^[^"\r\n]$',
        description="between fields; default: a tab in files named .tsv, else , ; | or tab, whichever cuts the header",
    )
    quote: Literal['"', "'", "none"] = Field(
        default='"',
        description="around fields that hold delimiters or line ends; none: quotation marks are plain characters",
    )

    @model_validator(mode="after")
    def _tell_quotes_from_delimiters(self) -> "Csv":
        if self.delimiter == self.quote:
            raise ValueError(f"delimiter and quote are both {self.quote}; choose two characters")
        return self

    def read(self) -> Iterator[tuple[str, Row]]:
        for place, row in read_delimited(self.path, Form(self._delimiter(), self.quote.replace("none", "")), self.needed()):
            yield place, with_number(row, self.weight)

    def _delimiter(self) -> str | None:
        return self.delimiter or ("\t" if bare_name(self.path).endswith((".tsv", ".tab")) else None)
