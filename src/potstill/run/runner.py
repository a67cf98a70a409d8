"""Runs a recipe: what is done stays done, what was interrupted goes on, what changed is done again."""

import json
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from potstill.core.artifact import MANIFEST, Artifact, disk_errors, file_lock, fingerprint, read_json, write_json, write_text
from potstill.core.errors import Interrupted, UserError
from potstill.core.progress import Progress, clock
from potstill.edges import ranks
from potstill.edges.machine import machine_facts, peak_gpu_memory, peak_memory, reset_peak_memory, versions
from potstill.recipe.parse import Recipe
from potstill.run.fingerprints import Fingerprints
from potstill.stages.base import Context, Stage
from potstill.train.work import Work


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
                if stage.across_seeds:
                    chosen = (*dict.fromkeys((*(chosen if seed in theirs else ()), *theirs.values())),)
                inputs[target] = (theirs[None],) if None in theirs else chosen
            own_seed = first if seed is None else seed
            copy = stage.model_copy(update={"seed": own_seed}) if stage.per_seed else stage
            nodes.append(Node(ident, copy, inputs))
            copies[stage.name][seed] = ident
    return nodes


@dataclass(frozen=True)
class Planned:
    """A node, what it will be called, and whether it is there already."""

    node: Node
    fingerprint: str
    folder: Path

    @property
    def done(self) -> bool:
        return (self.folder / MANIFEST).is_file()


def _agreed(recipe: Recipe, out: Path) -> tuple[list[Planned], list[bool]]:
    """The first process's plan, in all of them; what is done is asked once, for shared disks show a file to some later."""

    def told() -> list[tuple[str, Path, bool]]:
        return [(item.fingerprint, item.folder, item.done) for item in plan(recipe, out)]

    found = ranks.on_first(told)
    return [Planned(node, *item[:2]) for node, item in zip(nodes_of(recipe), found, strict=True)], [item[2] for item in found]


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
            digest = prints.of(node.stage, parents)
        except UserError:
            if not offline:
                raise
            digest = fingerprint(["unknown", node.id])
        item = Planned(node, digest, out / "artifacts" / f"{node.id}-{digest[:12]}")
        by_id[node.id] = item
        planned.append(item)
    if out.is_dir():
        prints.save()
    return planned


class Stopper:
    """Ctrl-C and SIGTERM ask for a stop; a second Ctrl-C does not wait."""

    AGAIN_S = 5.0  # torchrun passes a terminal's Ctrl-C on to processes that got it already

    def __init__(self, progress: Progress) -> None:
        self.asked, self._since = False, 0.0
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
            if ranks.several() and time.monotonic() - self._since < self.AGAIN_S:
                return
            raise KeyboardInterrupt
        self.asked, self._since = True, time.monotonic()
        if ranks.several():  # said when all have agreed: the signal may mean that one of them is gone
            return
        self._progress.note("stopping: saving first (Ctrl-C again to stop at once)")

    def check(self, where: str) -> None:
        if any(ranks.gathered(self.asked)):
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
    progress = progress if progress is not None and ranks.first() else Progress("quiet")
    with ranks.joined(), disk_errors(f"run folder {folder}"):
        if ranks.first():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "artifacts").mkdir(exist_ok=True)
        with file_lock(folder / ".lock", folder) if ranks.first() else nullcontext():
            return _run(recipe, folder, progress, command)


def _run(recipe: Recipe, out: Path, progress: Progress, command: str) -> dict[str, Artifact]:
    planned, finished = _agreed(recipe, out)
    done: dict[str, Artifact] = {}
    stopper = Stopper(progress)
    if any(finished):
        progress.note(f"{sum(finished)} of {len(planned)} stages are done already")
    if ranks.first():
        write_text(
            out / "recipe.json",
            json.dumps({"source": recipe.source, "command": command, "table": recipe.table}, indent=1, default=str),
        )

    def preflight() -> None:
        for item, there in zip(planned, finished, strict=True):
            if not there:
                item.node.stage.preflight()

    ranks.on_first(preflight)
    with stopper.listening():
        for item, there in zip(planned, finished, strict=True):
            ident = item.node.id
            if there:
                done[ident] = ranks.on_first(lambda folder=item.folder: Artifact.load(folder))
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
            context = Context(work, inputs, provenance(recipe, done, command), shared=out)
            parents = {i: done[i].fingerprint for ids in item.node.inputs.values() for i in ids}
            with progress.stage(ident, str(item.node.stage.kind)), disk_errors(ident):
                artifact = execute(item.node.stage, context, item.folder, item.fingerprint, parents, recipe.name)
            done[ident] = artifact
            progress.note(f"{ident:<14} done in {clock(artifact.seconds)}{_told(artifact)}")
            stopper.check(f"after {ident}")
    changed = sorted({name for artifact in done.values() for name in _other_versions(artifact)})
    if changed:
        progress.note(f"some stages were made with other versions of {', '.join(changed)}; delete {out} to make them anew")
    if not ranks.first():
        return done
    write_json(out / "run.json", {ident: artifact.folder.name for ident, artifact in done.items()})
    for artifact in done.values():
        if artifact.kind == "report":
            for name in ("report.html", "report.json"):
                shutil.copyfile(artifact.folder / name, out / name)
    return done


def execute(
    stage: Stage, context: Context, folder: Path, digest: str, parents: dict[str, str] | None = None, recipe: str = ""
) -> Artifact:
    """Run one stage in its work folder, then rename that into the artifact.

    Under torchrun all processes train together; what else there is to do, the first does for all.
    """
    begun = time.monotonic()
    reset_peak_memory()
    summary = stage.run(context) if stage.shared else ranks.on_first(lambda: stage.run(context))
    if ranks.several() and stage.shared:
        summary["processes"] = ranks.world()
    artifact = Artifact(
        folder=folder,
        name=context.work.name,
        kind=str(stage.kind),
        makes=stage.makes,
        fingerprint=digest,
        parents=parents or {},
        stage=stage.spec(),
        recipe=recipe,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        seconds=round(time.monotonic() - begun, 3),
        peak_memory_bytes=peak_memory(),
        peak_gpu_bytes=peak_gpu_memory(),
        versions=versions(),
        summary=summary,
    )
    return ranks.on_first(lambda: artifact.commit(context.work.folder))


def run_stage(stage: Stage, into: str | Path, *, progress: Progress | None = None) -> Artifact:
    """Run one stage by itself: for scripts that use no recipe. References are `path:…`, `hf:…` or artifacts.

    The same stage into the same folder again does nothing; an interrupted one goes on.

    Raises:
        UserError: as in `run_recipe`; also when the folder holds something else.
    """
    into = Path(into)
    name = stage.name or into.name
    stage = stage.model_copy(update={"name": name})
    progress = progress if progress is not None and ranks.first() else Progress("quiet")
    with ranks.joined(), disk_errors(f"folder {into}"):
        if ranks.first():
            into.parent.mkdir(parents=True, exist_ok=True)
        digest = ranks.on_first(lambda: Fingerprints(into.parent).of(stage, {}))
        with file_lock(into.parent / f".lock-{into.name}", into) if ranks.first() else nullcontext():
            found = ranks.on_first(lambda: _found(into, digest))
            if found is not None:
                return found
            ranks.on_first(stage.preflight)
            stopper = Stopper(progress)
            folder = into.parent / f".work-{into.name}-{digest[:12]}"
            work = Work(folder, name, progress, stop_requested=lambda: stopper.asked)
            with stopper.listening(), progress.stage(name, str(stage.kind)):
                return execute(stage, Context(work, {}, machine_facts()), into, digest)


def _found(into: Path, digest: str) -> Artifact | None:
    """The same stage's artifact, when it is there."""
    if (into / MANIFEST).is_file():
        found = Artifact.load(into)
        if found.fingerprint == digest:
            return found
        what = f"{found.kind} '{found.name}'"
        raise UserError(f"{into} holds another artifact ({what}); choose another folder or delete it")
    if into.exists() and any(into.iterdir()):
        raise UserError(f"{into} is not empty; choose another folder")
    return None


def _other_versions(artifact: Artifact) -> list[str]:
    now = versions()
    return [name for name, was in artifact.versions.items() if now.get(name) != was]


_TRAINED = {"parameters": "parameters", "response_tokens": "learned tokens", "steps": "steps"}


def _told(artifact: Artifact) -> str:
    """A stage's own figure for its closing line."""
    summary = artifact.summary
    match artifact.kind:
        case "pretrain" | "sft" | "distill":
            counts = [f"{summary[key]:,} {words}" for key, words in _TRAINED.items()]
            saved = 1 - summary["tokens"] / summary["padded_tokens"]
            told = [*counts, f"no padding (would be {saved:.0%})"]
            signal = summary.get("signal", {})
            if "rows_read" in signal:
                told.append(f"teacher: {signal['rows_computed']:,} rows computed, {signal['rows_read']:,} read back")
            return "  " + ", ".join(told)
        case "best":
            best = summary["best"]
            picked = best["candidates"][best["chosen"]]
            return f"  picked {picked['label']} out of {len(best['candidates'])} by {best['by']} ({picked['mean']:.4g})"
        case "cache":
            return f"  {summary['rows']:,} rows, {summary['bytes']:,} bytes"
        case "quantize":
            return f"  {len(summary['layers'])} layers at {summary['bits_per_weight']:g} bits per weight"
        case "evaluate":
            return f"  {summary['test_rows']:,} test rows"
        case "export":
            return "  " + ", ".join(name for name in summary["files"] if name.endswith((".safetensors", ".gguf")))
    return ""


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
