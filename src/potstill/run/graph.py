"""A recipe's stages as nodes, one for each seed that is trained apart, and which of them are done already."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from potstill.core.artifact import MANIFEST, Artifact, Hashes, fingerprint
from potstill.core.errors import UserError
from potstill.recipe.header import Recipe
from potstill.run.fingerprints import Fingerprints
from potstill.stages.base import Stage
from potstill.train.loop import in_bf16

State = Literal["done", "damaged", "outdated", "to do"]
SAID_ABOVE = 1_000_000_000  # bytes: reading fewer takes about a second


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
    """A node, what it will be called, and what is there of it already.

    Attributes:
        state: all but `done` is to do; `outdated`: whole, but made from an input that has changed since.
        elsewhere: its folder where a machine of the other precision, for which `auto` is another one, made it.
        trouble: why it is damaged or outdated.
        artifact: what its folder holds, by its manifest; None where there is no readable one.
    """

    node: Node
    fingerprint: str
    folder: Path
    elsewhere: Path
    state: State = "to do"
    trouble: str = ""
    artifact: Artifact | None = None

    @property
    def done(self) -> bool:
        return self.state == "done"

    @property
    def inputs(self) -> list[str]:
        """The ids of the nodes whose artifacts it reads."""
        return [ident for ids in self.node.inputs.values() for ident in ids]

    @property
    def work_folder(self) -> Path:
        """Where it works until it is finished."""
        return work_folder(self.folder)


def work_folder(folder: Path) -> Path:
    """Where a stage works until it is finished."""
    return folder.with_name(f".work-{folder.name}")


def plan(recipe: Recipe, out: Path, *, offline: bool = False, prints: Fingerprints | None = None) -> list[Planned]:
    """What a run would do; looks at manifests and sizes, touches nothing but its memory of file hashes.

    With `offline`, what cannot be identified without a network counts as not done, instead of being an error.
    """
    prints = prints if prints is not None else Fingerprints(out)
    planned: list[Planned] = []
    by_id: dict[str, Planned] = {}
    others: dict[str, str] = {}  # fingerprint here -> on a machine of the other precision
    for node in nodes_of(recipe):
        parents = {
            f"{target}[{i}]": by_id[ident].fingerprint for target, ids in node.inputs.items() for i, ident in enumerate(ids)
        }
        theirs = {place: others[by_fingerprint] for place, by_fingerprint in parents.items()}
        try:
            digest = prints.of(node.stage, parents)
            other = prints.of(node.stage, theirs, bf16=not in_bf16("auto"))
        except UserError:
            if not offline:
                raise
            digest = other = fingerprint(["unknown", node.id])
        others[digest] = other
        folder, elsewhere = (out / "artifacts" / f"{node.id}-{each[:12]}" for each in (digest, other))
        item = _looked_at(Planned(node, digest, folder, elsewhere))
        item = made_of(item, {ident: by_id[ident].artifact for ident in item.inputs})
        by_id[node.id] = item
        planned.append(item)
    if out.is_dir():
        prints.save()
    return planned


def _looked_at(item: Planned) -> Planned:
    """With what its folder holds, and whether that is whole by size."""
    if not (item.folder / MANIFEST).is_file():
        holds_something = item.folder.is_dir() and any(item.folder.iterdir())
        return _damaged(item, f"{MANIFEST} is missing") if holds_something else item
    try:
        artifact = Artifact.load(item.folder)
    except UserError:
        return _damaged(item, f"{MANIFEST} cannot be read")
    found = replace(item, state="done", artifact=artifact)
    return _damaged(found, damage) if (damage := artifact.damage()) else found


def _damaged(item: Planned, trouble: str) -> Planned:
    return replace(item, state="damaged", trouble=trouble)


def made_of(item: Planned, inputs: Mapping[str, Artifact | None]) -> Planned:
    """Outdated where an input was made again since and came out otherwise: fingerprints cannot see that.

    Training on a GPU is not bit for bit the same twice, and a study must not mix what was made from the one and the other.
    """
    if not item.done or item.artifact is None:
        return item
    for ident, there in inputs.items():
        was = item.artifact.contents.get(ident)
        if there is not None and there.files is not None and was is not None and was != there.content:
            return replace(item, state="outdated", trouble=f"{ident} was made again and came out otherwise")
    return item


def read_through(planned: Sequence[Planned], hashes: Hashes, say: Callable[[str], None] = lambda line: None) -> list[Planned]:
    """The same, once the contents of all that is done were compared with the manifests.

    Files that have not changed since they were hashed are not read, so that a run that is done costs nothing again.
    """
    checked: list[Planned] = []
    for item in planned:
        if item.done and item.artifact is not None:
            if (size := item.artifact.unread(hashes)) > SAID_ABOVE:
                say(f"{item.node.id:<14} comparing {size / 1e9:.1f} GB with the manifest")
            item = _damaged(item, damage) if (damage := item.artifact.damage(hashes)) else item
        checked.append(item)
    return checked


def in_use(planned: Sequence[Planned]) -> list[Path]:
    """The folders that a recipe's stages have, or will have, here or on a machine for which `auto` is another precision."""
    return [folder for item in planned for own in (item.folder, item.elsewhere) for folder in (own, work_folder(own))]
