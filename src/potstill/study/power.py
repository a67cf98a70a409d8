"""The smallest difference that a study's test rows and seeds could show, before any score exists."""

from dataclasses import dataclass
from math import inf, sqrt

from potstill.core.numbers import amount, decimals
from potstill.study.bootstrap import few_clusters, student
from potstill.study.records import MetricInfo
from potstill.study.verdicts import MIN_CLUSTERS

# Standard deviations over rows of the difference between two alike models, on a scale of 100: guesses on the wide side.
TYPICAL_SD = {"0–100": 25.0, "%": 45.0}  # exact match: one answer in five is right for one model and wrong for the other
ALIKE_WITHIN = 0.2  # share of that variance that rows of one cluster have in common
LUCK = 0.1  # of the rows' standard deviation: how far the values of two seeds lie apart


@dataclass(frozen=True)
class Reach:
    """What a study could show.

    Attributes:
        difference: half the width of the 95% interval to be expected, in the metric's unit; infinite where no verdict is given.
        rows, clusters, seeds: what it rests on.
        sd_rows, sd_seeds: what was assumed of single rows and of single seeds.
        icc: what was assumed that the rows of one cluster share.
    """

    difference: float
    rows: int
    clusters: int
    seeds: int
    sd_rows: float
    sd_seeds: float
    icc: float

    def sentence(self, metric: MetricInfo) -> str:
        """For a plan: what can be shown, from what, and what was assumed."""
        rows = f"{self.rows:,} test rows" + (f" in {self.clusters:,} groups" if self.clusters < self.rows else "")
        seeds = "1 seed" if self.seeds == 1 else f"{self.seeds} seeds"
        if self.difference == inf:
            return f"{rows} and {seeds} can show no difference: a verdict needs {MIN_CLUSTERS} groups of test rows."
        found = amount(self.difference, metric, decimals(metric.unit))
        luck = "; training luck is not in it" if self.seeds == 1 else ""
        return f"{rows} and {seeds} can show a difference of about {found} or more, if rows differ as they usually do{luck}."


def smallest_difference(
    *,
    rows: int,
    clusters: int | None = None,
    seeds: int = 1,
    sd_rows: float,
    sd_seeds: float | None = None,
    icc: float = ALIKE_WITHIN,
) -> Reach:
    """Half the width of the interval of a paired difference that so many rows, clusters and seeds would give.

    √((f · se_rows)² + (t/z · se_seeds)²) · z, with se_rows = sd_rows · √((1 + (rows/clusters − 1) · icc) / rows) and
    se_seeds = sd_seeds / √seeds; f widens for few clusters, t is Student's with seeds − 1 degrees of freedom. A true difference
    of this size is shown by half of such studies.

    Args:
        clusters: different keys among the rows; None: as many as rows.
        sd_rows: standard deviation over rows of the difference of two models; `TYPICAL_SD` has guesses by unit.
        sd_seeds: standard deviation over seeds of the difference; None: a tenth of `sd_rows`. With one seed it is left out.
        icc: share of the rows' variance that rows of one cluster have in common.

    Returns:
        The reach; infinite below 6 clusters, where no verdict is given.
    """
    groups = min(rows, rows if clusters is None else clusters)
    luck = LUCK * sd_rows if sd_seeds is None else sd_seeds
    if groups < MIN_CLUSTERS:
        return Reach(inf, rows, groups, seeds, sd_rows, luck, icc)
    of_rows = sd_rows * sqrt((1 + (rows / groups - 1) * icc) / rows) * few_clusters(groups) * student(None)
    of_seeds = luck / sqrt(seeds) * student(seeds - 1) if seeds > 1 else 0.0
    return Reach(sqrt(of_rows**2 + of_seeds**2), rows, groups, seeds, sd_rows, luck, icc)
