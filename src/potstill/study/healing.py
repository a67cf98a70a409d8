"""What healing did to quantised models, in words."""

import math
from collections.abc import Iterator, Sequence

from potstill.study.records import Healing, Study


def healing_in_words(healing: Sequence[Healing]) -> str:
    """The KL before and after, mean over seeds, of a seed whose healing was not kept as it is: what it was before.

    Of one that was kept for no seed: how far the KL grew.
    """
    kept = [one for one in healing if one.kept]
    before = _mean([one.kl_before for one in healing])
    reached = _mean([one.kl_after if one.kept or not kept else one.kl_before for one in healing])
    figures = f"KL to the teacher on validation rows {before:.3g} -> {reached:.3g} nats/token"
    if not kept:
        return f"healing was not kept: {figures}"
    some = f", kept for {len(kept)} of {len(healing)} seeds" if len(kept) < len(healing) else ""
    less = f", {1 - reached / before:.0%} less" if before > 0 else ""
    return f"healed: {figures}{less}{some}"


def of_healing(study: Study) -> Iterator[str]:
    """Caveats on rows whose healing was kept for some seeds alone, or for none."""
    for row in study.rows:
        undone = [one for one in row.healing or () if not one.kept]
        if row.equals is not None:
            yield f"{row.name}: {healing_in_words(undone)}. It is {row.equals} as it was: its figures say nothing of healing."
        elif undone:
            seeds = f"{len(undone)} of {len(row.seeds)} seeds"
            yield f"{row.name}: {healing_in_words(undone)} for {seeds}, which are {undone[0].student} as it was."


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
