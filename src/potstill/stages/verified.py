"""Exported files opened in their runtime and judged: do they answer as the model that they were made from?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from potstill.core.artifact import MANIFEST, Artifact, file_hash, read_json
from potstill.core.errors import UserError
from potstill.edges.llamacpp import Refused
from potstill.edges.models import PACKED
from potstill.exporters import compressed_tensors, web
from potstill.stages.reference import Reference
from potstill.stages.runtimes import Asked, Runtime, Theirs, runtime_of
from potstill.study.parity import compare_ids, distance, limit, verdict

VERIFIED = "verify.json"  # beside the files
FEW, POSITIONS = 24, 48  # positions that an export looks at, and `potstill verify` by default
_PLAIN = ("f32", "f16", "bf16")  # types of weights that nothing quantised
_COMPUTED_EXACTLY = ("int4",)  # types with which no runtime rounds: what rounding cost before excuses nothing
_FOLDERS = (compressed_tensors.FOLDER, web.FOLDER)  # of an export that hold files of their own
Heard = Callable[[int, int, str], None]


def damage(folder: Path, listed: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """Which of an export's files are not as they were written, and in what.

    Args:
        listed: size and SHA-256 of each file, as the export's summary has them.
    """
    found = {}
    for name, (size, digest) in listed.items():
        path = folder / name
        if not path.is_file():
            found[name] = "is missing"
        elif path.stat().st_size != size:
            found[name] = f"has {path.stat().st_size:,} bytes instead of {size:,}"
        elif file_hash(path) != digest:
            found[name] = "has the right size and another content: a bit flipped, or it was changed"
    return found


def written_as(file: Path) -> Sequence[Any] | None:
    """A file's size and hash as its export wrote them; None where no manifest beside it, or above its own folder, says so."""
    folder = export_of(file)
    if folder is None:
        return None
    return Artifact.load(folder).summary.get("files", {}).get(file.absolute().relative_to(folder).as_posix())


def refuse_changed(file: Path) -> None:
    """Refuse a file that is not as its export wrote it, where the export's manifest lies beside it or one folder above.

    Raises:
        UserError: says in what it differs.
    """
    listed = written_as(file)
    broken = damage(file.parent, {file.name: listed}) if listed is not None else {}
    if broken:
        raise UserError(f"{file} {broken[file.name]}; export the model again")


def export_of(file: Path) -> Path | None:
    """The folder of the export that a file belongs to, by the manifest beside it or above its own folder; None: of none."""
    folder = file.parent.absolute()
    above = [folder.parent] if folder.name in _FOLDERS else []
    return next((one for one in (folder, *above) if (one / MANIFEST).is_file()), None)


def exported_in(folder: Path) -> list[str]:
    """Files of a folder that can be verified: of safetensors the first for all of them, each GGUF file, a page's model."""
    return [*_weights_in(folder), *(f"{name}/{one}" for name in _FOLDERS for one in _weights_in(folder / name))]


def _weights_in(folder: Path) -> list[str]:
    described = (folder / "config.json").is_file()
    plain = [path for path in sorted(folder.glob("*.safetensors")) if path.name != PACKED][:1] if described else []
    page = [folder / "model.bin"] if (folder / "model.bin").is_file() and (folder / "model.json").is_file() else []
    return [path.name for path in (*plain, *sorted(folder.glob("*.gguf")), *page)]


def verify_files(
    folder: Path,
    names: Sequence[str],
    ours: Reference,
    *,
    positions: int = FEW,
    damaged: Mapping[str, str] | None = None,
    always_own: bool = False,
    heard: Heard = lambda done, total, name: None,
) -> dict[str, Any]:
    """Open each file in its runtime and compare; what `verify.json` holds.

    Args:
        names: as `exported_in` gives them.
        positions: at which distributions are compared.
        damaged: files that need not be opened, and why.
        always_own: tell what rounding cost itself, also where the limit does not depend on it.
        heard: gets how many positions of how many are done, and of which file.
    """
    found, left_out, versions = [], {}, {}
    for name in names:
        if why := _damage_of(name, damaged or {}):
            found.append({"file": name, "passed": False, "why": why})
            continue
        runtime = runtime_of(folder / name)
        versions |= runtime.versions()
        if (trouble := runtime.problem()) is not None:
            left_out[name] = trouble
        else:
            found.append(_verify(runtime, folder, name, ours, positions, always_own, heard))
    return {
        "against": ours.named,
        "rows": ours.passages.of,
        "runtimes": versions,
        "files": found,
        "not_verified": left_out,
        "passed": all(one["passed"] for one in found),
    }


def _damage_of(name: str, damaged: Mapping[str, str]) -> str:
    """Why a file need not be opened: it is damaged, or one that is read with it is; "" where nothing is known."""
    if name in damaged or name.endswith(".gguf"):
        return damaged.get(name, "")
    folder = name.rpartition("/")[0]
    beside = [one for one in damaged if one.rpartition("/")[0] == folder and not one.endswith((".gguf", "Modelfile"))]
    return f"{beside[0]} {damaged[beside[0]]}" if beside else ""


def _verify(
    runtime: Runtime, folder: Path, name: str, ours: Reference, positions: int, always_own: bool, heard: Heard
) -> dict[str, Any]:
    chosen, done = ours.passages.chosen(positions), 0
    total = sum(len(places) for _, places in chosen)

    def count(more: int) -> None:
        nonlocal done
        done += more
        heard(done, total, name)

    heard(0, total, name)
    told: dict[str, Any] = {"file": name, "runtime": runtime.name}
    try:
        told["type"] = runtime.type_of(folder / name)
        theirs = runtime.ask(folder / name, ours, Asked(chosen, ours.passages.first, count))
    except Refused as error:
        return {**told, "passed": False, "why": f"llama.cpp does not open it: {error}"}
    except (UserError, OSError) as error:
        return {**told, "passed": False, "why": f"cannot be opened: {error}"}
    return {**told, **_judged(told["type"], theirs, ours, positions, always_own)}


def _judged(type: str, theirs: Theirs, ours: Reference, positions: int, always_own: bool) -> dict[str, Any]:
    """Whether what a runtime made of a file passes, and the figures."""
    logp_PV = ours.logp_PV(positions)
    if theirs.logq_PV.shape != logp_PV.shape:
        why = f"its vocabulary has {theirs.logq_PV.shape[1]:,} rows, ours {logp_PV.shape[1]:,}"
        return {"passed": False, "why": why}
    ids, apart = compare_ids(theirs.texts, theirs.wanted, theirs.ids, ours.control), distance(logp_PV, theirs.logq_PV)
    said, weights = list(theirs.said), theirs.weights
    if weights is not None and weights.differ:
        said.append(f"{len(weights.differ)} of {weights.count} weights are not the model's, the first is '{weights.differ[0]}'")
    own = ours.own_kl(positions) if type not in _PLAIN and (always_own or verdict(type, ids, apart)) else None
    share = own if type not in _COMPUTED_EXACTLY else None
    why = verdict(type, ids, apart, share, said)
    if type in ("f16", "bf16") and apart.kl > limit(type) and (alone := ours.kl_of_storing(positions, type)) > apart.kl / 2:
        why += f" ({alone:.2g} by the weights' rounding alone: {type} does not hold this model; choose another type)"
    return {
        "passed": not why,
        "why": why,
        **asdict(apart),
        "limit": limit(type, share),
        "own_kl": own,
        "own_unknown": ours.own_unknown if type not in _PLAIN else "",
        "weights": None if weights is None else {"count": weights.count, "differ": list(weights.differ)},
        "texts": ids.texts,
        "differ": list(ids.differ),
        "known": ids.known,
        "prompt": ours.tokenizer.decode(ours.passages.first),
        "ours": ours.greedy,
        "theirs": theirs.greedy.strip(),
    }


def record_beside(export: Artifact) -> dict[str, Any]:
    """What was found when an export's files were verified last; as the export itself found it where that cannot be read.

    Empty of an export that is older than verification.
    """
    try:
        found = read_json(export.folder / VERIFIED)
        if all({"file", "passed"} <= one.keys() for one in found["files"]) and isinstance(found["not_verified"], dict):
            return found
    except (UserError, AttributeError, LookupError, TypeError):  # people may write beside an export what they like
        pass
    return export.summary.get("verified", {})


def unverified(names: Sequence[str], why: str) -> dict[str, Any]:
    """The record of files that were not opened."""
    return {"against": "", "rows": "", "runtimes": {}, "files": [], "not_verified": dict.fromkeys(names, why), "passed": True}
