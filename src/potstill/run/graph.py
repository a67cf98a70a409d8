"""A recipe's stages as nodes, one for each seed that is trained apart, and which of them are done already."""

from dataclasses import dataclass, field
from pathlib import Path

from potstill.core.artifact import MANIFEST, fingerprint
from potstill.core.errors import UserError
from potstill.recipe.header import Recipe
from potstill.run.fingerprints import Fingerprints
from potstill.stages.base import Stage


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
