"""The models of a study, and its test rows: how each model reads them, and which of them it knows from its training."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from potstill.core.component import Settings
from potstill.core.errors import UserError, told_of
from potstill.core.types import Example, Split
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, Pair, instruction_pairs
from potstill.edges.models import form_of, load_tokenizer
from potstill.sources import Source
from potstill.stages.known import question_hashes, trained_rows
from potstill.stages.lineage import Place
from potstill.stages.refs import ModelRef
from potstill.stages.training import hash_order
from potstill.study.records import RowRole
from potstill.train.work import Work


class Row(Settings):
    """One model of a study."""

    name: str = Field(min_length=1, max_length=40, description="as the report prints it")
    model: ModelRef
    role: RowRole = Field(
        default="other", description="what it is compared as: base, start, sft, kd, rl, quantized, rtn, teacher, candidate"
    )


@dataclass(frozen=True)
class Rendered:
    """The test rows in the form of one chat template."""

    renderer: Renderer
    pairs: list[Pair]


@dataclass(frozen=True)
class Readable:
    """The test rows that every model can read.

    Attributes:
        read: how each model reads them, by its place.
        of_rows: rows of the split, those left out and those not drawn included.
        left_out: rows of the split that some model cannot read, by reason.
        shortened: of `examples`, those whose context was cut for some model.
    """

    examples: list[Example]
    read: dict[str, Rendered]
    of_rows: int
    left_out: dict[str, int]
    shortened: int


def readable(
    models: list[tuple[str, str]], data: Source, prompts: Prompts, split: Split, most: int | None, who: str
) -> Readable:
    """The rows of a split that every model can read, and how each reads them.

    Args:
        models: name and place of each.
        most: so many of them, drawn by a hash; None: all.
        who: the stage, for messages.

    Raises:
        UserError: no row is left, or a model's template refuses them all.
    """
    readers: dict[str, tuple[str, Renderer]] = {}
    form_at: dict[str, str] = {}
    for name, where in models:
        tokenizer = load_tokenizer(where)
        form_at[where] = form_of(tokenizer)
        with told_of(name):
            readers.setdefault(form_at[where], (name, Renderer(tokenizer, prompts)))
    found: list[tuple[Example, dict[str, Pair], int]] = []
    left_out: Counter[str] = Counter()
    for example in data.examples(split, left_out):
        pairs: dict[str, Pair] = {}
        reasons: set[str] = set()
        shortened = 0
        for form, (name, renderer) in readers.items():
            mine = Counts()
            with told_of(name):
                pair = next(iter(instruction_pairs([example], renderer, mine)), None)
            if pair is not None:
                pairs[form] = pair
            reasons |= mine.dropped.keys()
            shortened = max(shortened, mine.context_shortened)
        if len(pairs) < len(readers):
            left_out[min(reasons)] += 1  # once, whichever models cannot read it
            continue
        found.append((example, pairs, shortened))
    of_rows = len(found) + sum(left_out.values())
    found.sort(key=lambda row: hash_order(row[0]))
    found = found[:most]
    if not found:
        why = ", ".join(f"{n:,} {reason}" for reason, n in left_out.items()) or "the split is empty"
        raise UserError(f"{who}: no {split} row of {data.kind} is left ({why})")
    read = {form: Rendered(renderer, [pairs[form] for _, pairs, _ in found]) for form, (_, renderer) in readers.items()}
    return Readable(
        [example for example, *_ in found],
        {where: read[form] for where, form in form_at.items()},
        of_rows,
        dict(left_out),
        sum(shortened for *_, shortened in found),
    )


def known_rows(jobs: Sequence[tuple[str, Place]], examples: Sequence[Example], split: str, work: Work) -> dict[str, int]:
    """How many of the rows each model, or one that it was made from or taught by, was trained on, by the model's name.

    Raises:
        UserError: a model of this run was.
    """
    asked_N = question_hashes(examples)
    learned: dict[str, np.ndarray] = {}
    known = dict.fromkeys((name for name, _ in jobs), 0)
    for name, place in jobs:
        met_N = np.zeros(len(examples), dtype=bool)
        for digest, artifact in place.ancestry.items():
            if digest not in learned:
                learned[digest] = trained_rows(artifact.folder)
            own_N = np.isin(asked_N, learned[digest])
            if own_N.any() and artifact.folder.parent.resolve() == work.folder.parent.resolve():
                raise UserError(f"{work.name}: {known_in_words(artifact.name, own_N.sum(), len(examples), split, name)}")
            met_N |= own_N
        known[name] = max(known[name], int(met_N.sum()))
    return known


def known_in_words(stage: str, rows: int, of: int, split: str, name: str) -> str:
    return (
        f"{stage} was trained on {rows:,} of the {of:,} {split} rows, and {name} is it or was made from it: "
        "give the study the same `data` and splits as all training stages, or other rows"
    )
