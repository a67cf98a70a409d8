"""Any Parquet file."""

from collections.abc import Iterator

from potstill.core.errors import UserError
from potstill.sources._arrow import without_nulls
from potstill.sources._cells import Row
from potstill.sources._columns import FileColumns
from potstill.sources._files import open_bytes

_ROWS = 256  # converted at a time


class Parquet(FileColumns, kind="parquet"):
    """The rows of a local Parquet file, read a few hundred at a time; columns are named by fields.

    Raises:
        UserError: the file is missing, truncated or not Parquet; names the row and the column that is missing or of the wrong
            type.
    """

    def read(self) -> Iterator[tuple[str, Row]]:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        with open_bytes(self.path) as file:
            try:
                count = 0
                opened = ParquetFile(file, page_checksum_verification=True)
                for batch in opened.iter_batches(_ROWS, columns=self._columns(opened.schema_arrow.names)):
                    for row in batch.to_pylist():
                        count += 1
                        yield f"{self.path} row {count}", without_nulls(row)
            except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # not UTF-8, a date of year 10,000
                told = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
                raise UserError(
                    f"{self.path}: cannot be read as Parquet ({told}); download it again, or set data.kind to what it is"
                ) from None
        if not count:
            raise UserError(f"{self.path}: has no rows; write at least one")

    def _columns(self, names: list[str]) -> list[str] | None:
        """The columns to read; all of them where one is missing, so that the complaint can name what is there.

        Raises:
            UserError: two columns have one name.
        """
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{self.path}: two columns are named '{twice}'; rename one of them")
        wanted = set(self.needed())
        return [name for name in names if name in wanted | {self.tools}] if wanted <= set(names) else None
