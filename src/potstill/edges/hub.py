"""Where a model's files lie: a folder on disk, or a name on the hub."""

import json
import logging
import os
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from potstill.core.component import suggest
from potstill.core.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@cache
def library() -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return transformers


def refuse_remote_code(where: str, error: Exception) -> None:
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        raise UserError(f"{where}: needs its own Python code, which potstill never runs; choose another model") from error


@contextmanager
def hub_errors(name: str):
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever the hub's HTTP client of the day raises
        refuse_remote_code(f"hf:{name}", error)
        text = str(error)
        raise UserError(
            f"hf:{name}: cannot be loaded from the hub ({type(error).__name__}: {text.splitlines()[0][:160]}); "
            "without a network, download it elsewhere with 'hf download " + name + " --local-dir DIR' and write 'path:DIR'"
        ) from error


def gguf_of(where: str) -> Path | None:
    """The GGUF file that `path:` names, by its ending or, of Ollama's files without one, by its first bytes; else None.

    Raises:
        UserError: no such file.
    """
    scheme, _, rest = where.partition(":")
    file = Path(os.path.expanduser(rest))
    if scheme != "path" or file.is_dir():
        return None
    if file.suffix.lower() != ".gguf":
        return file if file.is_file() and _begins(file, b"GGUF") else None
    if not file.is_file():
        near = suggest(file.name, [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else [])
        raise UserError(f"path:{rest}: no such file{near}")
    return file


def _begins(file: Path, data: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(data)) == data


def folder_of(where: str) -> Path | None:
    """The local folder that `path:` names, checked; None for a hub name.

    Raises:
        UserError: no such folder, no model in it, or an adapter beside or in place of the model.
    """
    scheme, _, rest = where.partition(":")
    if scheme == "hf":
        return None
    folder = Path(os.path.expanduser(rest))  # unlike pathlib's, leaves the home of nobody as it is
    if folder.is_file():
        raise UserError(f"path:{rest}: is a file and not a GGUF file; name the folder that holds config.json and the weights")
    if not folder.is_dir():
        near = suggest(folder.name, [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else [])
        raise UserError(f"path:{rest}: no such folder{near}")
    refuse_adapter(folder, where)
    if not (folder / "config.json").is_file():
        files = sorted(file.name for file in folder.glob("*.[gG][gG][uU][fF]"))
        named = f"; name the GGUF file itself: path:{(Path(rest) / files[0]).as_posix()}" if files else ""
        raise UserError(f"path:{rest}: holds no config.json, so it is not a model that transformers saved{named}")
    return folder


def hub_name(where: str) -> tuple[str, str | None]:
    name, _, revision = where.removeprefix("hf:").partition("@")
    return name, revision or None


@cache
def commit_of(name: str, revision: str | None) -> str:
    """The commit that a hub name stands for now, or that the cache holds when the hub is out of reach."""
    if revision and len(revision) == 40:
        return revision
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        with hub_errors(name):
            return str(HfApi().model_info(name, revision=revision, timeout=10).sha)
    except UserError:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent.name
        raise


def files_of(where: str) -> Path:
    """The folder that holds a model's configuration and weights; of a hub name the downloaded snapshot of its commit.

    Raises:
        UserError: as `folder_of`, or the hub is out of reach.
    """
    folder = folder_of(where)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download

    name, revision = hub_name(where)
    with hub_errors(name):
        commit = commit_of(name, revision)
        small = ["config.json", "generation_config.json", INDEX, *ADAPTER[:1]]
        snapshot = Path(snapshot_download(name, revision=commit, allow_patterns=small))
        refuse_adapter(snapshot, where)
        files = [WEIGHTS, *(indexed(snapshot / INDEX) if (snapshot / INDEX).is_file() else ())]
        return Path(snapshot_download(name, revision=commit, allow_patterns=files))


def indexed(index: Path) -> list[str]:
    """The weight files that an index names.

    Raises:
        UserError: it is not an index.
    """
    try:
        return sorted({Path(name).name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: not an index of weight files; copy or download it again") from None


def refuse_adapter(folder: Path, where: str) -> None:
    """Refuse adapter files: with peft installed transformers would add them to the model, without it leave them out.

    Raises:
        UserError: there are some; names the ways out.
    """
    found = [name for name in ADAPTER if (folder / name).is_file()]
    if not found:
        return
    merge = "merge it into its base model with peft (merge_and_unload(), then save_pretrained) and name the merged folder"
    if (folder / "config.json").is_file():
        raise UserError(
            f"{where}: holds a model and an adapter ({', '.join(found)}), and which of them is meant is not said; {merge}, "
            "or move the adapter's files out of the folder to use the model without it"
        )
    raise UserError(f"{where}: holds an adapter ({', '.join(found)}) and no model; {merge}, or name the base model itself")


def is_cached(where: str) -> bool:
    """Whether the weights of a hub name are on this machine."""
    from huggingface_hub import try_to_load_from_cache

    name, revision = hub_name(where)
    return any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in (WEIGHTS, INDEX))


def cached_models() -> tuple[Path, int, bool]:
    """The hub's cache on this machine, how many models it holds, and whether the hub is switched off."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    return cache, len(list(cache.glob("models--*"))) if cache.is_dir() else 0, bool(constants.HF_HUB_OFFLINE)
