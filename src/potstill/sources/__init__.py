"""Where rows come from. One file per source; a new file here is a new `kind` in every recipe."""

import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator

from pydantic import Field, model_validator

from potstill.core.component import Component, Settings, discover
from potstill.core.types import Example, Split


class Splits(Settings):
    """Shares of the rows kept out of training; a row's split depends on the hash of its key alone."""

    validation: float = Field(default=0.05, ge=0, lt=1, description="share of keys for validation")
    test: float = Field(default=0.1, ge=0, lt=1, description="share of keys for the test")

    @model_validator(mode="after")
    def _leave_some_to_train(self) -> "Splits":
        if self.validation + self.test >= 1:
            raise ValueError(f"validation + test = {self.validation + self.test:g} leaves no row to train on")
        return self

    def of(self, key: str) -> Split:
        """The split of a key: stable when rows are added, removed or reordered."""
        place = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
        if place < self.test:
            return "test"
        return "validation" if place < self.test + self.validation else "train"


class Source(Component):
    """Rows of one data set, as `Example`s, in a fixed order and without loading them all into memory."""

    splits: Splits = Splits()
    share: float = Field(
        default=1.0, gt=0, le=1, description="use this share of the rows, drawn by a hash: stable, and an even mix of the file"
    )
    limit: int | None = Field(
        default=None, ge=1, description="for a quick look: use only the first so many rows of the file, over all splits"
    )

    @abstractmethod
    def rows(self, skipped: Counter[str] | None = None) -> Iterator[Example]:
        """Every row, all splits, in a fixed order; rows left out are counted in `skipped` by reason.

        Raises:
            UserError: the file is missing, empty, not UTF-8, not what its columns say; names file and line.
        """

    @abstractmethod
    def content_hash(self) -> str:
        """A hex digest that changes whenever `rows` would."""

    def split_of(self, example: Example) -> Split:
        """Sources with splits of their own override this."""
        return self.splits.of(example.key)

    def examples(self, split: Split, skipped: Counter[str] | None = None) -> Iterator[Example]:
        """The rows of one split; `skipped` counts the rows left out over all splits, for they have none."""
        for number, example in enumerate(filter(self._drawn, self.rows(skipped))):
            if self.limit is not None and number >= self.limit:
                return
            if self.split_of(example) == split:
                yield example

    def _drawn(self, example: Example) -> bool:
        """Whether a row belongs to `share`: by its own texts, and by another hash than the one that splits."""
        if self.share == 1:
            return True
        hashed = hashlib.blake2b(digest_size=8, person=b"potstill share")
        for part in (example.key, example.instruction, example.response):
            data = part.encode()
            hashed.update(len(data).to_bytes(8, "big") + data)
        return int.from_bytes(hashed.digest(), "big") / 2**64 < self.share


discover(__name__, __path__)
