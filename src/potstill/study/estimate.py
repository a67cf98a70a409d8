"""A model's value of one metric."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A model's value of one metric.

    Attributes:
        value: None when no row was scored by every seed.
        ci: 95% interval over clusters of test rows and seeds; None with fewer than two clusters.
        rows: test rows that entered.
        abstained: answers, over all seeds, that the metric gave no score.
        by_seed: the value of each seed.
    """

    value: float | None
    ci: tuple[float, float] | None
    rows: int
    abstained: int
    by_seed: tuple[float | None, ...]
