"""Whether a difference is more than luck: a paired bootstrap over clusters of test rows, and Student's t over training seeds.

For a model with scores x[s, n] (seed s, test row n) and weights w[n] (1, or the row's response tokens or bytes) the value is

    mean over s of  Σ_n x[s, n] / Σ_n w[n]

**Rows.** Test rows with equal keys (questions on one paragraph, functions of one module) form one cluster: they rise and
fall together, so that drawing them one by one makes intervals too narrow (20 clusters of 10 rows, of whose variance 30% is
the cluster's: 95% intervals cover 67%; Cameron, Gelbach and Miller, Bootstrap-based improvements for inference with
clustered errors, 2008). One resample draws K of the K clusters with replacement, each with all its rows, *the same ones
for every model*; the value remains a ratio of sums over all rows drawn. A percentile interval over few units is too narrow
(6 clusters: 86% instead of 95%), so each resample's distance from the value is multiplied by √(K/(K−1)) · t(K−1) / z, with t
and z the 97.5% points of Student and Gauss: the expanded percentile interval (Hesterberg, What teachers should know about
the bootstrap, 2015, section 4.2), 1.05 at 40 clusters, 1.44 at 6.

**Seeds.** A resample adds the luck of training: for each list of seeds, with deviations d[s] of the seeds' values from their
mean, Σ_s g[s] · d[s] / √(S(S−1)) / √(χ²/(S−1)), with g standard normal and χ² of S−1 degrees of freedom. For every model, and
for every difference of two with equal lists, that is Student's t with S−1 degrees of freedom times the standard error of
the mean over S seeds: wide for two seeds (t = 12.7), where the spread itself is hardly known. Added to the rows' part, and
for two models of different lists to each other, it is the Behrens-Fisher interval (Fisher 1935), which covers 95% or a
little more whatever the parts' sizes. Drawing the S seeds with replacement would cover 80% with three of them. Luck that is
particular to a row *and* a seed enters both parts, which widens the interval a little (compare Owen, The pigeonhole
bootstrap, 2007). With one seed there is no such part: the interval speaks of the test rows alone, and the verdict says so.

A comparison uses the rows on which both models have a score from all of their seeds; a row on which a metric abstained
is left out on both sides, never set to 0.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, pi, sqrt, tan
from statistics import NormalDist

import numpy as np

from potstill.study.records import MetricInfo, ModelRow

LEVEL = 0.95
_CELLS = 4_000_000  # entries of the resampling matrix held at once: 32 MB


@dataclass(frozen=True)
class Sample:
    """A statistic ready to be resampled: sums of seed-averaged scores and of weights per cluster, and the seeds' deviations.

    Attributes:
        deviations: for each list of seeds, how far the value of each lies from their average.
        rows, clusters: how many were scored.
    """

    scores_K: np.ndarray
    weights_K: np.ndarray
    deviations: dict[tuple[int | None, ...], np.ndarray]
    by_seed: tuple[float | None, ...]
    rows: int
    clusters: int

    @property
    def differing(self) -> int:
        """Of a difference: the clusters in which it is not 0."""
        return int(np.count_nonzero(self.scores_K))

    @property
    def value(self) -> float | None:
        weight = self.weights_K.sum()
        return float(self.scores_K.sum() / weight) if self.rows and weight > 0 else None

    @classmethod
    def of(
        cls, row: ModelRow, metric: MetricInfo, weights_N: np.ndarray, clusters_N: np.ndarray, keep_N: np.ndarray
    ) -> "Sample":
        """The statistic of one model over the rows to keep; the model must have scores there.

        Args:
            weights_N: see `Study.weights_N`.
        """
        scores_SN = row.scores_SN(metric.name)
        assert scores_SN is not None
        scores_SN = np.where(keep_N, scores_SN, 0.0)
        weights_N = keep_N * weights_N
        K = int(clusters_N.max(initial=-1)) + 1
        scores_K = np.bincount(clusters_N, scores_SN.mean(0), minlength=K)
        weights_K = np.bincount(clusters_N, weights_N, minlength=K)
        if weights_N.sum() == 0:
            return cls(scores_K, weights_K, {}, (None,) * len(scores_SN), 0, 0)
        by_seed = scores_SN.sum(1) / weights_N.sum()
        deviations = {row.seeds: by_seed - by_seed.mean()} if len(by_seed) > 1 else {}
        kept = len(np.unique(clusters_N[keep_N]))
        return cls(scores_K, weights_K, deviations, tuple(map(float, by_seed)), int(keep_N.sum()), kept)

    def minus(self, other: "Sample") -> "Sample":
        """The difference on the same rows, taken before resampling so that equal scores give exactly 0.

        What is smaller than the rounding of the sums is 0 too: two models that differ in nothing must not differ by 1e-15.
        """
        deviations = dict(self.deviations)
        scale = max(abs(self.value or 0.0), abs(other.value or 0.0))
        for seeds, deviation in other.deviations.items():
            deviations[seeds] = _subtract(deviations[seeds], deviation, scale) if seeds in deviations else -deviation
        return Sample(_subtract(self.scores_K, other.scores_K), self.weights_K, deviations, (), self.rows, self.clusters)


def resample(samples: Sequence[Sample], *, resamples: int, seed: int) -> np.ndarray:
    """Resample every sample with the same draws of clusters, and of seeds' luck where the lists of seeds are equal.

    Returns:
        [samples, resamples]; NaN where a resample drew no scored row.
    """
    if not samples:
        return np.empty((0, resamples))
    K = len(samples[0].scores_K)
    columns_KM = np.stack([column for sample in samples for column in (sample.scores_K, sample.weights_K)], axis=1)
    sums_RM = np.concatenate([counts_RK @ columns_KM for counts_RK in _cluster_counts(K, resamples, seed)])
    with np.errstate(divide="ignore", invalid="ignore"):
        values_MR = (sums_RM[:, 0::2] / sums_RM[:, 1::2]).T
    luck: dict[tuple[int | None, ...], np.ndarray] = {}
    for sample, values_R in zip(samples, values_MR, strict=True):
        if sample.value is not None and sample.clusters > 1:
            values_R += (few_clusters(sample.clusters) - 1) * (values_R - sample.value)
        for seeds, deviation_S in sample.deviations.items():
            if seeds not in luck:
                luck[seeds] = _luck(len(seeds), resamples, np.random.default_rng([seed, 1, _number(seeds)]))
            values_R += luck[seeds] @ deviation_S
    return values_MR


def _number(seeds: tuple[int | None, ...]) -> int:
    """Of a list of seeds, by what it holds: draws must not depend on which model comes first."""
    return int.from_bytes(hashlib.blake2b(repr(seeds).encode(), digest_size=8).digest(), "big")


def unseen(metric: MetricInfo, K: int) -> float | None:
    """How far rows that are not among K clusters may move a value: 1 − 0.025^(1/K) of the metric's scale, the 97.5% limit of
    Clopper and Pearson (1934) for what none of K showed; None without a scale of two ends.

    Where all K clusters have one score, every resample has it too, and a percentile interval would have no width.
    """
    low, high = metric.scale
    return (high - low) * (1 - ((1 - LEVEL) / 2) ** (1 / K)) if high - low < inf else None


def few_clusters(K: int) -> float:
    """√(K/(K−1)) · t(K−1) / z: how much wider a percentile interval over K clusters must be; K is at least 2."""
    return sqrt(K / (K - 1)) * student(K - 1) / student(None)


def student(df: int | None) -> float:
    """The 97.5% point of Student's t with so many degrees of freedom; None: of the normal distribution.

    Exact for 1 and 2, else by Fisher's expansion (Abramowitz and Stegun 26.7.5), off by 0.1% at 3 and less beyond.
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    if df is None:
        return z
    if df == 1:
        return tan(pi * LEVEL / 2)
    if df == 2:
        return LEVEL * sqrt(2 / (1 - LEVEL**2))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92_160,
    )
    return z + sum(term / df**power for power, term in enumerate(terms, 1))


def _luck(S: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Weights [resamples, S] that turn seeds' deviations from their mean into draws of the mean's own luck."""
    gauss_RS = rng.standard_normal((resamples, S))
    chi_R1 = np.sqrt(rng.chisquare(S - 1, (resamples, 1)) / (S - 1))
    return gauss_RS / chi_R1 / sqrt(S * (S - 1))


def _subtract(a: np.ndarray, b: np.ndarray, scale: float = 0.0) -> np.ndarray:
    """a − b; exactly 0 where what is left is the rounding of sums."""
    difference = a - b
    return np.where(np.abs(difference) <= 1e-12 * np.maximum(np.abs(a) + np.abs(b), scale), 0.0, difference)


def percentile_interval(replicates: np.ndarray) -> tuple[float, float] | None:
    """The middle 95% of the replicates; None where so many are not finite that the interval's ends are among them."""
    finite = replicates[np.isfinite(replicates)]
    if len(finite) == 0 or len(finite) < (1 + LEVEL) / 2 * len(replicates):
        return None
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def scored(row: ModelRow, metric: MetricInfo) -> np.ndarray | None:
    """[test rows], True where every seed has a score; None when this metric was not taken of this model."""
    scores_SN = row.scores_SN(metric.name)
    return None if scores_SN is None else np.asarray(np.isfinite(scores_SN).all(axis=0))


def _cluster_counts(K: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each resample drew each cluster: chunks of [resamples, K], the same for the same seed."""
    rng = np.random.default_rng([seed, 0])
    chunk = max(1, _CELLS // max(1, K))
    for start in range(0, resamples, chunk):
        R = min(chunk, resamples - start)
        if K == 0:
            yield np.zeros((R, 0))
            continue
        drawn = rng.integers(0, K, size=(R, K)) + K * np.arange(R)[:, None]
        yield np.bincount(drawn.ravel(), minlength=R * K).reshape(R, K).astype(float)
