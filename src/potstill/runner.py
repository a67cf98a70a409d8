"""Runs a recipe: what is done stays done, what was interrupted goes on, what changed is done again."""

import json
import platform
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from potstill.core.artifact import MANIFEST, Artifact, disk_errors, fingerprint, read_json, run_lock, write_json, write_text
from potstill.core.component import Component
from potstill.core.errors import Interrupted, UserError
from potstill.core.progress import Progress, clock
from potstill.edges.models import content_id
from potstill.recipe import Recipe
from potstill.sources import Source
from potstill.stages.base import Context, Stage, walk
from potstill.train.work import Work

PACKAGES = (
    "potstill",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "numpy",
    "rouge-score",
    "gguf",
    "babel",
)


@dataclass(frozen=True)
class Node:
    """One stage of one seed.

    Attributes:
        id: the stage's name, with `@seed` where it is done for several.
        inputs: for each stage it refers to, the ids of the nodes it gets.
    """

    id: str
    stage: Stage
    inputs: dict[str, tuple[str, ...]] = field(default_factory=dict)


def nodes_of(recipe: Recipe) -> list[Node]:
    """The recipe's stages, those that depend on a seed repeated for each of the recipe's seeds."""
    seeds = recipe.header.seeds
    first = seeds[0]
    copies: dict[str, dict[int | None, str]] = {}  # stage -> seed -> node; seed None where there is one copy
    nodes: list[Node] = []
    for stage in recipe.stages:
        targets = [ref.target for _, ref in stage.references() if ref.scheme == "stage"]
        repeated = len(seeds) > 1 and (stage.per_seed or (not stage.gathers and any(None not in copies[t] for t in targets)))
        copies[stage.name] = {}
        for seed in seeds if repeated else (None,):
            ident = stage.name if seed is None else f"{stage.name}@{seed}"
            inputs = {}
            for target in targets:
                theirs = copies[target]
                chosen = (theirs[seed],) if seed in theirs else tuple(theirs.values())
                inputs[target] = (theirs[None],) if None in theirs else chosen
            own_seed = first if seed is None else seed
            copy = stage.model_copy(update={"seed": own_seed}) if stage.per_seed else stage
            nodes.append(Node(ident, copy, inputs))
            copies[stage.name][seed] = ident
    return nodes


class Fingerprints:
    """Fingerprints of stages, remembering the hashes of big files between runs."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "hashes.json"
        self._hashes: dict[str, Any] = {}
        if self._file.is_file():
            with suppress(ValueError):  # damaged: hashed again
                found = json.loads(self._file.read_text(encoding="utf-8"))
                self._hashes = found if isinstance(found, dict) else {}
        self._known = dict(self._hashes)
        self._sources: dict[str, str] = {}

    def source(self, source: Source) -> str:
        """Of the rows a source gives, wherever its file lies."""
        spec = source.spec()
        key = fingerprint(spec)
        if key not in self._sources:
            path = getattr(source, "path", None)
            content = None
            if path is not None:
                stat = Path(path).expanduser().stat()
                remembered = f"{Path(path).expanduser().resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{source.kind}"
                content = self._hashes.get(remembered)
                if content is None:
                    content = self._hashes[remembered] = source.content_hash()
            self._sources[key] = fingerprint(
                [{k: v for k, v in spec.items() if k != "path"}, source.version, content or source.content_hash()]
            )
        return self._sources[key]

    def of(self, stage: Stage, parents: dict[str, str]) -> str:
        """Of a stage: its fields, its data, its inputs; names and places do not count."""
        spec = {key: value for key, value in stage.spec().items() if key not in stage.ignored}
        if stage.sources():
            spec["data"] = [self.source(source) for source in stage.sources()]
        models = {}
        for place, ref in stage.references():
            if ref.scheme in ("hf", "path") and "model" in ref.accepts:
                models[place] = content_id(str(ref), self._hashes)
            elif ref.scheme == "path":
                models[place] = Artifact.load(Path(ref.target).expanduser()).fingerprint
        versions = {place: value.version for place, value in walk(stage) if isinstance(value, Component)}
        return fingerprint([spec, versions, models, parents])

    def save(self) -> None:
        """Remember what was hashed, if anything new was."""
        if self._hashes != self._known:
            write_json(self._file, self._hashes)


@dataclass(frozen=True)
class Planned:
    """A node, what it will be called, and whether it is there already."""

    node: Node
    fingerprint: str
    folder: Path

    @property
    def done(self) -> bool:
        return (self.folder / MANIFEST).is_file()


def plan(recipe: Recipe, out: Path, *, offline: bool = False) -> list[Planned]:
    """What a run would do; looks, touches nothing but its memory of file hashes.

    With `offline`, what cannot be identified without a network counts as not done, instead of being an error.
    """
    prints = Fingerprints(out)
    planned: list[Planned] = []
    by_id: dict[str, Planned] = {}
    for node in nodes_of(recipe):
        parents = {
            f"{target}[{i}]": by_id[ident].fingerprint for target, ids in node.inputs.items() for i, ident in enumerate(ids)
        }
        try:
            print_ = prints.of(node.stage, parents)
        except UserError:
            if not offline:
                raise
            print_ = fingerprint(["unknown", node.id])
        item = Planned(node, print_, out / "artifacts" / f"{node.id}-{print_[:12]}")
        by_id[node.id] = item
        planned.append(item)
    if out.is_dir():
        prints.save()
    return planned


class Stopper:
    """Ctrl-C and SIGTERM ask for a stop; a second Ctrl-C does not wait."""

    def __init__(self, progress: Progress) -> None:
        self.asked = False
        self._progress = progress

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen while inside; other threads than the main one cannot."""
        try:
            before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._progress.note("stopping: saving first (Ctrl-C again to stop at once)")

    def check(self, where: str) -> None:
        if self.asked:
            raise Interrupted(f"stopped {where}; run the same command again to go on")


def run_recipe(
    recipe: Recipe, out: str | Path | None = None, *, progress: Progress | None = None, command: str = ""
) -> dict[str, Artifact]:
    """Run what is not done yet, in order, and return every stage's artifact by node id.

    Args:
        out: the run's folder; default `runs/NAME` in the current folder.

    Raises:
        UserError: anything the user can mend. What was finished stays.
        Interrupted: asked to stop; the state is saved.
    """
    folder = Path(out) if out is not None else Path("runs") / recipe.name
    progress = progress or Progress("quiet")
    with disk_errors(f"run folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "artifacts").mkdir(exist_ok=True)
        lock = run_lock(folder)
        with lock:
            return _run(recipe, folder, progress, command)


def _run(recipe: Recipe, out: Path, progress: Progress, command: str) -> dict[str, Artifact]:
    planned = plan(recipe, out)
    done: dict[str, Artifact] = {}
    stopper = Stopper(progress)
    left = sum(not item.done for item in planned)
    if left < len(planned):
        progress.note(f"{len(planned) - left} of {len(planned)} stages are done already")
    write_text(
        out / "recipe.json",
        json.dumps({"source": recipe.source, "command": command, "table": recipe.table}, indent=1, default=str),
    )
    with stopper.listening():
        for item in planned:
            ident = item.node.id
            if item.done:
                done[ident] = Artifact.load(item.folder)
                continue
            stopper.check(f"before {ident}")
            work = Work(
                out / "artifacts" / f".work-{item.folder.name}",
                ident,
                progress,
                recipe.header.checkpoint,
                recipe.header.log,
                lambda: stopper.asked,
            )
            inputs = {target: [done[i] for i in ids] for target, ids in item.node.inputs.items()}
            context = Context(work, inputs, provenance(recipe, done, command))
            parents = {i: done[i].fingerprint for ids in item.node.inputs.values() for i in ids}
            with progress.stage(ident, str(item.node.stage.kind)), disk_errors(ident):
                artifact = execute(item.node.stage, context, item.folder, item.fingerprint, parents, recipe.name)
            done[ident] = artifact
            progress.note(f"{ident:<14} done in {clock(artifact.seconds)}{_told(artifact)}")
            stopper.check(f"after {ident}")
    write_json(out / "run.json", {ident: artifact.folder.name for ident, artifact in done.items()})
    for artifact in done.values():
        if artifact.kind == "report":
            for name in ("report.html", "report.json"):
                shutil.copyfile(artifact.folder / name, out / name)
    return done


def execute(
    stage: Stage, context: Context, folder: Path, print_: str, parents: dict[str, str] | None = None, recipe: str = ""
) -> Artifact:
    """Run one stage in its work folder, then rename that into the artifact."""
    begun = time.monotonic()
    reset_peak_memory()
    summary = stage.run(context)
    artifact = Artifact(
        folder=folder,
        name=context.work.name,
        kind=str(stage.kind),
        makes=stage.makes,
        fingerprint=print_,
        parents=parents or {},
        stage=stage.spec(),
        recipe=recipe,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        seconds=round(time.monotonic() - begun, 3),
        peak_memory_bytes=peak_memory(),
        versions=versions(),
        summary=summary,
    )
    return artifact.commit(context.work.folder)


def run_stage(stage: Stage, into: str | Path, *, progress: Progress | None = None) -> Artifact:
    """Run one stage by itself: for scripts that use no recipe. References are `path:…`, `hf:…` or artifacts.

    The same stage into the same folder again does nothing; an interrupted one goes on.

    Raises:
        UserError: as in `run_recipe`; also when the folder holds something else.
    """
    into = Path(into)
    name = stage.name or into.name
    stage = stage.model_copy(update={"name": name})
    with disk_errors(f"folder {into}"):
        into.parent.mkdir(parents=True, exist_ok=True)
        prints = Fingerprints(into.parent)
        print_ = prints.of(stage, {})
        if (into / MANIFEST).is_file():
            found = Artifact.load(into)
            if found.fingerprint == print_:
                return found
            raise UserError(f"{into} holds another artifact ({found.kind} '{found.name}'); choose another folder or delete it")
        if into.exists() and any(into.iterdir()):
            raise UserError(f"{into} is not empty; choose another folder")
        progress = progress or Progress("quiet")
        stopper = Stopper(progress)
        work = Work(into.parent / f".work-{into.name}-{print_[:12]}", name, progress, stop_requested=lambda: stopper.asked)
        with (
            run_lock(work.folder.with_name(work.folder.name + ".lock")),
            stopper.listening(),
            progress.stage(name, str(stage.kind)),
        ):
            artifact = execute(stage, Context(work, {}, machine_facts()), into, print_)
        shutil.rmtree(work.folder.with_name(work.folder.name + ".lock"), ignore_errors=True)
        return artifact


_TRAINED = {"parameters": "parameters", "response_tokens": "learned tokens", "steps": "steps"}


def _told(artifact: Artifact) -> str:
    """A stage's own figure for its closing line."""
    summary = artifact.summary
    match artifact.kind:
        case "pretrain" | "sft" | "distill":
            counts = (f"{summary[key]:,} {words}" for key, words in _TRAINED.items())
            return "  " + ", ".join(counts)
        case "quantize":
            return f"  {len(summary['layers'])} layers at {summary['bits_per_weight']:g} bits per weight"
        case "evaluate":
            return f"  {summary['test_rows']:,} test rows"
        case "export":
            return "  " + ", ".join(name for name in summary["files"] if name.endswith((".safetensors", ".gguf")))
    return ""


def versions() -> dict[str, str]:
    """Of Python and the packages that a result can depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def machine_facts() -> dict[str, Any]:
    """What a report says of the machine and the packages."""
    import psutil
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": versions(),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": psutil.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": psutil.virtual_memory().total,
            "gpu": gpu,
        },
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def provenance(recipe: Recipe, done: dict[str, Artifact], command: str) -> dict[str, Any]:
    """What a report says of where it came from."""
    return {
        **machine_facts(),
        "command": command,
        "recipe": recipe.name,
        "seeds": list(recipe.header.seeds),
        "fingerprints": {ident: artifact.fingerprint for ident, artifact in done.items()},
        "seconds": {ident: artifact.seconds for ident, artifact in done.items()},
        "peak_memory_bytes": {ident: artifact.peak_memory_bytes for ident, artifact in done.items()},
    }


def reset_peak_memory() -> None:
    """Start measuring a stage's peak memory anew, where the system can."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Peak resident memory of this process in bytes, since `reset_peak_memory` where the system can tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def find_run(run: str | Path) -> Path:
    """A run's folder by path, or by name under `runs/`.

    Raises:
        UserError: there is no finished run there.
    """
    for folder in (Path(run), Path("runs") / str(run)):
        if (folder / "run.json").is_file():
            return folder
        if (folder / "artifacts").is_dir():
            raise UserError(f"{folder}: the run has not finished; run its recipe again to go on")
    raise UserError(f"{run}: no run there; give a folder such as runs/quickstart")


def artifacts_of(run: Path) -> dict[str, Artifact]:
    """A finished run's artifacts by node id."""
    return {ident: Artifact.load(run / "artifacts" / name) for ident, name in read_json(run / "run.json").items()}
