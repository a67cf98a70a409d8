"""Any JSON-lines file."""

from collections.abc import Iterator
from typing import ClassVar

from potstill.sources._cells import Row
from potstill.sources._columns import FileColumns
from potstill.sources._lines import read


class Jsonl(FileColumns, kind="jsonl"):
    """One JSON object per line of a local file, UTF-8, perhaps compressed; columns are named by fields.

    Raises:
        UserError: names the file, the line and the column that is missing or of the wrong type.
    """

    version: ClassVar[int] = 5  # 3: a chat is one key; 4: tools, reasoning, weights of messages; 5: keys without typography

    def read(self) -> Iterator[tuple[str, Row]]:
        return read(self.path)
