"""Rows of data sets on the Hugging Face hub, streamed; from its local cache where there is no network."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.core.errors import UserError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHARD = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\..*)?")


@dataclass(frozen=True)
class HubRows:
    """A data set of the hub.

    Attributes:
        name: such as databricks/databricks-dolly-15k.
        revision: branch, tag or commit; None: the newest.
        subset: the data set's configuration; None: its default.
        splits: the data set's own splits, read one after another.
        instead: what to do where the hub cannot be read, as errors say it.
    """

    name: str
    revision: str | None = None
    subset: str | None = None
    splits: tuple[str, ...] = ("train",)
    instead: str = "name its rows, as JSON lines, with `--set data.path=…`"

    def commit(self) -> str:
        """The commit that the revision (or the newest state) stands for; a commit stands for itself, without network.

        Raises:
            UserError: the data set is neither reachable nor cached.
        """
        return self.revision if self.revision and _COMMIT.fullmatch(self.revision) else self._locate()[1]

    def stream(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each row with its place, all of one commit.

        Raises:
            UserError: the data set is neither reachable nor wholly cached, or cannot be read, or lacks the subset or split.
        """
        where, commit = self._locate()
        for split in self.splits:
            label = self.name if self.splits == ("train",) else f"{self.name} {split}"
            try:
                for number, row in enumerate(self._load(where, commit, split), 1):
                    yield f"{label} row {number}", dict(row)
            except Exception as error:  # a dozen kinds, by file format and by network library
                raise self._unreadable(split, error) from error

    def _load(self, where: str, commit: str, split: str) -> Any:
        from datasets import Features, Value, load_dataset, load_dataset_builder
        from datasets.packaged_modules.csv.csv import Csv

        revision = commit if where == self.name else None
        fields: dict[str, Any] = {"name": self.subset, "revision": revision}
        if isinstance(load_dataset_builder(where, **fields), Csv):
            # as they stand: pandas would read "NA" as nothing, and "007" as 7 in a part of the file that holds numbers alone
            fields |= {"na_filter": False, "keep_default_na": False}
            heads = list(load_dataset(where, split=split, streaming=True, nrows=1, **fields))
            fields["features"] = Features({column: Value("string") for head in heads[:1] for column in head})
        return load_dataset(where, split=split, streaming=True, **fields)

    def _unreadable(self, split: str, error: Exception) -> UserError:
        told = " ".join(str(error).split())[:400]
        if "Config name is missing" in told or "BuilderConfig" in told:
            return UserError(f"{self.name}: name one of its subsets with data.subset ({told})")
        if "Bad split" in told or "Unknown split" in told:
            return UserError(f"{self.name}: has no split '{split}'; set data.split ({told})")
        return UserError(f"{self.name}: cannot be read ({type(error).__name__}: {told}); {self.instead}")

    def _locate(self) -> tuple[str, str]:
        """What `load_dataset` takes, and the commit: the hub's name for it, or the folder of a cached copy."""
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

        try:
            return self.name, str(HfApi().dataset_info(self.name, revision=self.revision).sha)
        except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
            at = f" at revision '{self.revision}'" if self.revision else ""
            raise UserError(
                f"{self.name}: the hub has no such data set{at}, or it is private; check data.hub and data.revision"
            ) from None
        except Exception:  # no network, offline mode, a proxy: each library has its own kind
            pass
        try:
            folder = snapshot_download(self.name, repo_type="dataset", revision=self.revision, local_files_only=True)
        except Exception:
            raise UserError(
                f"cannot reach the hub for {self.name}; download it where there is network and {self.instead}, "
                "or set HF_HOME to a cache that has it"
            ) from None
        self._check_shards(Path(folder))
        return folder, Path(folder).name

    def _check_shards(self, folder: Path) -> None:
        """Refuse a cached copy that lacks one of a file's numbered parts: its rows would be fewer, and nobody would know."""
        found = [(file, match) for file in folder.rglob("*") if (match := _SHARD.fullmatch(file.name))]
        for file, match in found:
            stem, _, count, end = match.groups()
            lost = [i for i in range(int(count)) if not (file.parent / f"{stem}{i:05}-of-{count}{end or ''}").exists()]
            if lost:
                raise UserError(
                    f"{self.name}: the hub is out of reach and the cached copy lacks {len(lost)} of the {int(count)} parts of "
                    f"{stem}…{end or ''}; download it again where there is network"
                )
