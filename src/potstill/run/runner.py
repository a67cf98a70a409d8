"""Runs a recipe: what is done stays done, what was interrupted goes on, what changed is done again."""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from potstill.core.artifact import MANIFEST, OWN_CHECKSUMS, Artifact, disk_errors, file_lock, write_text
from potstill.core.errors import Interrupted, UserError
from potstill.core.progress import Progress, clock
from potstill.edges import ranks
from potstill.edges.machine import machine_facts, peak_gpu_memory, peak_memory, reset_peak_memory, versions
from potstill.recipe.header import Recipe
from potstill.run.fingerprints import CODE, Fingerprints
from potstill.run.folder import leftover_note, leftovers, write_run
from potstill.run.graph import Planned, in_use, made_of, plan, read_through
from potstill.run.preflight import done_models, refuse, refuse_stage, stage_notes
from potstill.run.stopper import Stopper
from potstill.stages.base import Context, Stage
from potstill.train.work import Work


def run_recipe(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    progress: Progress | None = None,
    command: str = "",
    stopper: Stopper | None = None,
) -> dict[str, Artifact]:
    """Run what is not done yet, in order, and return every stage's artifact by node id.

    Args:
        out: the run's folder; default `runs/NAME` in the current folder.
        stopper: who listens for Ctrl-C; default: one for the time of the run.

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
            return _Run(recipe, folder, progress, command, stopper).run()


class _Run:
    """One run of a recipe in its folder, whose lock is held."""

    def __init__(self, recipe: Recipe, out: Path, progress: Progress, command: str, stopper: Stopper | None) -> None:
        self.recipe, self.out, self.progress, self.command = recipe, out, progress, command
        self.stopper = stopper if stopper is not None else Stopper()
        self.stopper.progress = progress
        self.prints = Fingerprints(out)
        self.done: dict[str, Artifact] = {}

    def run(self) -> dict[str, Artifact]:
        with self.stopper.listening(), stopping(self.stopper, "the run has"):
            planned = ranks.on_first(self.look)
            finished = sum(item.done for item in planned)
            if finished:
                self.progress.note(f"{finished} of {len(planned)} stages are done already")
            ranks.on_first(lambda: self.prepare(planned))
            for item in planned:
                self.stage(item)
            self.say_what_is_old(planned)
            if ranks.first():
                self.copy_reports()
        return self.done

    def look(self) -> list[Planned]:
        """What there is to do; asked in the first process only, because shared disks show a file to some later."""
        planned = read_through(plan(self.recipe, self.out, prints=self.prints), self.prints.hashes, self.progress.note)
        self.prints.save()
        return planned

    def prepare(self, planned: list[Planned]) -> None:
        """Refuse what cannot succeed; then write down what is run."""
        refuse(self.recipe, self.out, done_models(planned))
        for note in stage_notes([item.node.stage for item in planned if not item.done]):
            self.progress.note(note)
        table = {"source": self.recipe.source, "command": self.command, "table": self.recipe.table}
        write_text(self.out / "recipe.json", json.dumps(table, indent=1, default=str))
        write_run(self.out, {item.node.id: item.folder.name for item in planned})

    def stage(self, item: Planned) -> None:
        """Take what is done; do the rest."""
        ident = item.node.id
        item = made_of(item, self.done)  # an input may have been made again in this run
        if item.done and item.artifact is not None:
            self.done[ident] = item.artifact
            return
        if item.trouble:
            self.progress.note(f"{ident:<14} is {item.state}, and is made again: {item.trouble}")
        self.stopper.check(f"before {ident}")
        inputs = {target: [self.input(i) for i in ids] for target, ids in item.node.inputs.items()}
        ranks.on_first(lambda: self.go_on_from_damaged(item))
        with self.progress.stage(ident, str(item.node.stage.kind)), disk_errors(ident), stopping(self.stopper, f"{ident}:"):
            made_by = provenance(self.recipe, self.done, self.command)
            context = Context(self.work(item), inputs, made_by, shared=self.out, code=CODE)
            parents = {i: self.done[i] for i in item.inputs}
            artifact = execute(item.node.stage, context, item.folder, item.fingerprint, parents, self.recipe.name)
        self.done[ident] = artifact
        ranks.on_first(lambda: self.remember(artifact))
        summary = item.node.stage.closing(artifact.summary)
        self.progress.note(f"{ident:<14} done in {clock(artifact.seconds)}{'  ' if summary else ''}{summary}")
        self.stopper.check(f"after {ident}")

    def input(self, ident: str) -> Artifact:
        """An artifact that a stage is about to read.

        Raises:
            UserError: it was damaged since the run began.
        """
        artifact = self.done[ident]
        if damage := ranks.on_first(lambda: artifact.damage(self.prints.hashes)):
            raise UserError(f"{ident} was damaged while the run went on: {damage}; run the same command again to make it again")
        return artifact

    def work(self, item: Planned) -> Work:
        header, stopper = self.recipe.header, self.stopper
        return Work(
            item.work_folder,
            item.node.id,
            self.progress,
            header.checkpoint,
            header.log,
            lambda: stopper.asked,
            stopper.hold,
            stopper.interruptible,
        )

    def go_on_from_damaged(self, item: Planned) -> None:
        """What has checksums of its own computes only what it lacks."""
        if item.state == "damaged" and item.node.stage.makes in OWN_CHECKSUMS and not item.work_folder.exists():
            item.folder.replace(item.work_folder)

    def remember(self, artifact: Artifact) -> None:
        """Its files were hashed as it was committed."""
        self.prints.hashes.learn(artifact)
        self.prints.save()

    def say_what_is_old(self, planned: list[Planned]) -> None:
        changed = sorted({name for artifact in self.done.values() for name in _other_versions(artifact)})
        if changed:
            names = ", ".join(changed)
            self.progress.note(f"some stages were made with other versions of {names}; delete {self.out} to make them again")
        if ranks.first():
            for line in leftover_note(leftovers(self.out, in_use(planned)), self.recipe.source):
                self.progress.note(line)

    def copy_reports(self) -> None:
        for artifact in self.done.values():
            if artifact.makes == "report":
                for name in ("report.html", "report.json"):
                    shutil.copyfile(artifact.folder / name, self.out / name)


@contextmanager
def stopping(stopper: Stopper, what: str) -> Iterator[None]:
    """A stop that did not wait ends as one that did.

    Raises:
        Interrupted: so it is.
    """
    try:
        yield
    except KeyboardInterrupt:
        if ranks.several() or not stopper.asked:
            raise
        raise Interrupted(f"{what} stopped; what was saved is kept: run the same command again to go on") from None
    finally:
        stopper.released()


def execute(
    stage: Stage,
    context: Context,
    folder: Path,
    digest: str,
    parents: Mapping[str, Artifact] | None = None,
    recipe: str = "",
) -> Artifact:
    """Run one stage in its work folder, then rename that into the artifact.

    Under torchrun all processes train together; what else there is to do, the first does for all.
    """
    begun = time.monotonic()
    reset_peak_memory()
    bound = stage.reading(lambda ref: context.artifacts(ref)[0].folder, lambda name: None)
    summary = bound.run(context) if stage.shared else ranks.on_first(lambda: bound.run(context))
    context.work.hold()
    parents = parents or {}
    if ranks.several() and stage.shared:
        summary["processes"] = ranks.world()
    artifact = Artifact(
        folder=folder,
        name=context.work.name,
        kind=str(stage.kind),
        makes=stage.makes,
        fingerprint=digest,
        parents={ident: artifact.fingerprint for ident, artifact in parents.items()},
        contents={ident: artifact.content for ident, artifact in parents.items()},
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
            prints = Fingerprints(into.parent)
            found = ranks.on_first(lambda: _found(into, digest, prints, progress))
            if found is not None:
                return found
            ranks.on_first(lambda: refuse_stage(stage))
            for note in stage_notes([stage]):
                progress.note(note)
            stopper = Stopper(progress)
            folder = into.parent / f".work-{into.name}-{digest[:12]}"
            work = Work(
                folder,
                name,
                progress,
                stop_requested=lambda: stopper.asked,
                hold=stopper.hold,
                interruptible=stopper.interruptible,
            )
            with stopper.listening(), progress.stage(name, str(stage.kind)), stopping(stopper, f"{name}:"):
                return execute(stage, Context(work, {}, machine_facts(), code=CODE), into, digest)


def _found(into: Path, digest: str, prints: Fingerprints, progress: Progress) -> Artifact | None:
    """The same stage's artifact, when it is there and whole."""
    if not (into / MANIFEST).is_file():
        if into.exists() and any(into.iterdir()):
            raise UserError(f"{into} is not empty; choose another folder")
        return None
    found = Artifact.load(into)
    if found.fingerprint != digest:
        what = f"{found.kind} '{found.name}'"
        raise UserError(f"{into} holds another artifact ({what}); choose another folder or delete it")
    damage = found.damage(prints.hashes)
    prints.save()
    if damage:
        progress.note(f"{found.name:<14} is damaged, and is made again: {damage}")
        return None
    return found


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
