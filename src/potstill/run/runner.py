"""Runs a recipe: what is done stays done, what was interrupted goes on, what changed is done again."""

import json
import shutil
import time
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from potstill.core.artifact import MANIFEST, Artifact, disk_errors, file_lock, write_json, write_text
from potstill.core.errors import UserError
from potstill.core.progress import Progress, clock
from potstill.edges import ranks
from potstill.edges.machine import machine_facts, peak_gpu_memory, peak_memory, reset_peak_memory, versions
from potstill.recipe.header import Recipe
from potstill.run.fingerprints import Fingerprints
from potstill.run.graph import Planned, nodes_of, plan
from potstill.run.preflight import done_models, refuse, refuse_stage
from potstill.run.stopper import Stopper
from potstill.stages.base import Context, Stage
from potstill.train.work import Work


def _agreed(recipe: Recipe, out: Path) -> tuple[list[Planned], list[bool]]:
    """The first process's plan, in all of them; what is done is asked once, for shared disks show a file to some later."""

    def told() -> list[tuple[str, Path, bool]]:
        return [(item.fingerprint, item.folder, item.done) for item in plan(recipe, out)]

    found = ranks.on_first(told)
    return [Planned(node, *item[:2]) for node, item in zip(nodes_of(recipe), found, strict=True)], [item[2] for item in found]


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

    ranks.on_first(lambda: refuse(recipe, out, done_models(planned, finished)))
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
            told = item.node.stage.closing(artifact.summary)
            progress.note(f"{ident:<14} done in {clock(artifact.seconds)}{'  ' if told else ''}{told}")
            stopper.check(f"after {ident}")
    changed = sorted({name for artifact in done.values() for name in _other_versions(artifact)})
    if changed:
        progress.note(f"some stages were made with other versions of {', '.join(changed)}; delete {out} to make them anew")
    if not ranks.first():
        return done
    write_json(out / "run.json", {ident: artifact.folder.name for ident, artifact in done.items()})
    for artifact in done.values():
        if artifact.makes == "report":
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
            ranks.on_first(lambda: refuse_stage(stage))
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
