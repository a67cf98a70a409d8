"""Every exported file opened in its runtime, beside the model that it was made from."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from potstill.core.artifact import MANIFEST, Artifact, write_json, write_text
from potstill.core.errors import UserError
from potstill.core.numbers import scientific
from potstill.core.progress import Progress
from potstill.edges.compressed import is_compressed
from potstill.edges.models import load_stored, load_tokenizer, positions_of
from potstill.report.verified import equal_ids, equal_weights, figures_in_words, with_section
from potstill.run.folder import RUN, artifacts_of, find_run
from potstill.stages.export import as_trained
from potstill.stages.lineage import behind, made_here
from potstill.stages.passages import passages_for
from potstill.stages.reference import Reference, full_precision
from potstill.stages.verified import VERIFIED, damage, export_of, exported_in, verify_files

_AS_WRITTEN = "its files are as they were written, by size and SHA-256"


@dataclass
class Target:
    """Files that share one reference.

    Attributes:
        names: of the files, in `folder`.
        reference: `path:…` or `hf:…` of the model that they were made from.
        model: its artifact; None: it was not made here.
        damaged: files that are not as they were written.
        note: what a reader must know of what was not looked at.
        keeps: whether the result is written beside the files: they are an export, and all of it.
    """

    folder: Path
    names: list[str]
    reference: str
    model: Artifact | None = None
    damaged: dict[str, str] = field(default_factory=dict)
    note: str = ""
    keeps: bool = False


def targets_of(target: str, against: str | None) -> list[Target]:
    """What `potstill verify` was asked to look at: a file, a folder, an export, or all exports of a run.

    Raises:
        UserError: nothing is there, nothing in it can be verified, or the model that it was made from is gone.
    """
    path = Path(target).expanduser()
    of = export_of(path) if path.is_file() else None
    if of is not None:
        export, name = _of_export(Artifact.load(of), against), path.absolute().relative_to(of).as_posix()
        if name not in export.names:
            raise UserError(f"{path}: holds no weights that can be verified; the export has {', '.join(export.names)}")
        return [replace(export, names=[name], keeps=False)]
    if path.is_file():
        if against:
            return [Target(path.parent, [path.name], against, made_here(against))]
        note = "no manifest lies beside it, so only the runtime was asked: bits that flipped before cannot be seen"
        return [Target(path.parent, [path.name], f"path:{path}", note=note)]
    if (path / MANIFEST).is_file():
        return [_of_export(Artifact.load(path), against)]
    if path.is_dir() and not (path / RUN).is_file():
        return _of_folder(path, against)
    if not path.exists() and path.suffix in (".gguf", ".safetensors", ".bin"):
        raise UserError(f"{path}: no such file")
    run = find_run(target)
    exports = [artifact for artifact in artifacts_of(run).values() if artifact.makes == "export"]
    if not exports:
        raise UserError(f"{run}: the run exported nothing yet; add a stage of kind 'export', or name a file or folder")
    return [_of_export(artifact, against) for artifact in exports]


def _of_folder(folder: Path, against: str | None) -> list[Target]:
    names = exported_in(folder)
    if not names:
        raise UserError(
            f"{folder}: holds no .gguf file, no model of safetensors and no web page; name an export, a run or a file"
        )
    if against:
        return [Target(folder, names, against, made_here(against))]
    note = "the folder has no manifest, so only the runtime was asked: bits that flipped before cannot be seen"
    plain = [name for name in names if name.endswith(".safetensors") and "/" not in name and not is_compressed(folder)]
    others = [name for name in names if name not in plain]
    if plain and others:
        return [Target(folder, others, f"path:{folder}", note=f"{note}; compared with {plain[0]} beside them")]
    alone = [name for name in names if name.endswith(".gguf")]
    left = [name for name in names if name not in alone]
    if not alone:
        raise UserError(f"{folder}: {left[0]} alone, with no model to compare it with; name it with --against")
    if left:
        note += f"; {', '.join(left)} was not looked at, because nothing says which model it is: name it with --against"
    return [Target(folder, [name], f"path:{folder / name}", note=note) for name in alone]


def _of_export(artifact: Artifact, against: str | None) -> Target:
    if artifact.makes != "export":
        raise UserError(f"{artifact.folder}: holds what the stage '{artifact.name}' made, and not an export; name an export")
    folder, listed = artifact.folder, artifact.summary["files"]
    broken = damage(folder, listed)
    names = list(dict.fromkeys([*exported_in(folder), *broken]))
    if not names:
        raise UserError(f"{folder}: the export holds no weights that can be verified")
    target = Target(folder, names, "", damaged=broken, keeps=True)
    if against:
        target.reference, target.model = against, made_here(against)
        target.keeps = _made_from(artifact, against, target.model)
        if not target.keeps:
            target.note = f"{against} is not what it was made from, as far as its manifest says: its own record stays as it is"
        return target
    ref = str(artifact.stage["model"])
    target.model = behind(artifact, ref)
    if not ref.startswith("stage:"):
        target.reference = ref
    elif target.model is not None:
        target.reference = f"path:{target.model.folder}"
    else:
        name = ref.removeprefix("stage:")
        told = f"of its files, {'; '.join(f'{one} {why}' for one, why in broken.items())}" if broken else _AS_WRITTEN
        raise UserError(
            f"{folder}: {told}; the model that it was made from, the stage '{name}' of its run, is not beside it any more: "
            "name its folder by --against to compare answers"
        )
    return target


def _made_from(export: Artifact, reference: str, model: Artifact | None) -> bool:
    """Whether an export was made from this very model."""
    scheme, _, name = str(export.stage["model"]).partition(":")
    if scheme == "stage":
        return model is not None and model.fingerprint in export.parents.values()
    there, _, other = reference.partition(":")
    return scheme == there and (name == other or (scheme == "path" and Path(name).resolve() == Path(other).resolve()))


def reference_of(target: Target) -> Reference:
    """The model to compare with, loaded, with the chat template that an export gives it.

    Raises:
        UserError: it cannot be loaded.
    """
    where, artifact = target.reference, target.model
    model, tokenizer = load_stored(where), load_tokenizer(where)
    passages = passages_for(artifact, tokenizer, positions_of(model.config))
    as_trained(artifact, tokenizer)  # after the passages, which are as they were trained
    named = f"{artifact.name} ({artifact.folder})" if artifact is not None else where
    return Reference(model, tokenizer, passages, named, full_precision(artifact))


def verify(target: Target, positions: int, progress: Progress) -> dict[str, Any]:
    """Compare, and write the result beside an export's files and on its card."""
    with progress.stage("verify", str(target.folder)):
        progress.note(f"{'verify':<14} loading {target.reference}")

        def heard(done: int, total: int, name: str) -> None:
            progress.update(done, total, "position", file=name)

        record = verify_files(
            target.folder,
            target.names,
            reference_of(target),
            positions=positions,
            damaged=target.damaged,
            always_own=True,
            heard=heard,
        )
    record["created"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    record |= {"folder": str(target.folder)} | ({"note": target.note} if target.note else {})
    if target.keeps:
        write_json(target.folder / VERIFIED, {key: value for key, value in record.items() if key != "folder"})
        card = target.folder / "README.md"
        if card.is_file():
            write_text(card, with_section(card.read_text(encoding="utf-8"), record))
    return record


def passed(record: dict[str, Any]) -> bool:
    """Whether every file was opened, at least one, and answers as the model."""
    return bool(record["files"]) and record["passed"] and not record["not_verified"]


def print_record(record: dict[str, Any]) -> None:
    """For a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(Text(record["folder"], "bold"))
    for line, style in _lines(record):
        console.print(Text(line, style))


def _lines(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for one in record["files"]:
        mark, style = ("✓", "green") if one["passed"] else ("✗", "red")
        yield f"{mark} {figures_in_words(one)}", style
        if "kl" not in one:
            continue
        yield f"  {one['type']} in {one['runtime']}: limit {one['limit']:.1g}, largest KL {scientific(one['kl_max'])}", ""
        yield f"  {one['positions']} positions of {record['rows']}; {equal_ids(one)} tricky texts have equal ids", ""
        if one["weights"] is not None:
            yield f"  {equal_weights(one)} weights are the model's bit for bit", ""
        if one["own_kl"] is not None:
            yield f"  rounding itself cost {one['own_kl']:.2g} nats at these positions", ""
        if one["own_unknown"]:
            yield f"  what rounding itself cost is not known: {one['own_unknown']}", "yellow"
        for text, why in one["known"].items():
            yield f"  known difference at {text!r}: {why}", ""
        yield f"  asked {_short(one['prompt'])}", "dim"
        yield f"  ours   {_short(one['ours'])}", "dim"
        yield f"  theirs {_short(one['theirs'])}", "dim"
    for name, why in record["not_verified"].items():
        yield f"– {name} is not verified: {why}", "yellow"
    if "note" in record:
        yield f"  {record['note']}", ""


def _short(text: str, most: int = 90) -> str:
    shown = repr(text)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"
