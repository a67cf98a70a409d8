"""Rows of data sets on the Hugging Face hub, streamed; from its local cache where there is no network."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potstill.core.errors import UserError

_COMMIT = re.compile(r"[0-9a-f]{40}")


def commit(hub: str, revision: str | None) -> str:
    """The commit that a revision (or the newest state) stands for; a commit stands for itself, without network.

    Raises:
        UserError: the data set is neither reachable nor cached.
    """
    return revision if revision and _COMMIT.fullmatch(revision) else _locate(hub, revision)[1]


def stream(hub: str, revision: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of the split "train" with its place, all of one commit.

    Raises:
        UserError: the data set is neither reachable nor cached, or cannot be read.
    """
    name, sha = _locate(hub, revision)
    from datasets import load_dataset

    try:
        revision = sha if name == hub else None
        for number, row in enumerate(load_dataset(name, split="train", streaming=True, revision=revision), 1):
            yield f"{hub} row {number}", dict(row)
    except Exception as error:  # a dozen kinds, by file format and by network library
        raise UserError(
            f"{hub}: cannot be read ({type(error).__name__}: {error}); set data.path to its rows as JSON lines"
        ) from error


def _locate(hub: str, revision: str | None) -> tuple[str, str]:
    """What `load_dataset` takes, and the commit: the hub's name for it, or the folder of a cached copy."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return hub, str(HfApi().dataset_info(hub, revision=revision).sha)
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
        at = f" at revision '{revision}'" if revision else ""
        raise UserError(
            f"{hub}: the hub has no such data set{at}, or it is private; check data.hub and data.revision"
        ) from None
    except Exception:  # no network, offline mode, a proxy: each library has its own kind
        pass
    try:
        folder = snapshot_download(hub, repo_type="dataset", revision=revision, local_files_only=True)
    except Exception:
        raise UserError(
            f"cannot reach the hub for {hub}; download it where there is network and name its rows, as JSON lines, "
            "with `--set data.path=…`, or set HF_HOME to a cache that has it"
        ) from None
    return folder, Path(folder).name
