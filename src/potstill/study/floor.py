"""Whether two models score so little that a difference between them is no use to anyone."""

from math import exp, isinf

from potstill.study.records import MetricInfo

OF_SCALE = 0.10  # 10 points of 100: where Rouge-L of two unrelated English texts lies
OF_TEACHER = 0.25
PER_TOKEN = 0.01  # probability of the right token, as a geometric mean: 4.6 nats a token


def near_floor(metric: MetricInfo, a: float | None, b: float | None, teacher: float | None = None) -> bool:
    """Whether both values lie near the worst end of the metric's scale.

    On a scale of 0 to 100: both below 10 points from the worst end, or both below a quarter of the teacher's distance from it.
    In nats per token: both above 4.6, a probability of the right token below 1%. Other units have no known floor: False.
    """
    if a is None or b is None:
        return False
    if metric.unit == "nats/token" and not metric.higher_is_better:
        return max(exp(-a), exp(-b)) < PER_TOKEN
    low, high = metric.scale
    if isinf(low) or isinf(high):
        return False
    best = max(_height(metric, a), _height(metric, b))
    return best < OF_SCALE * (high - low) or (teacher is not None and best < OF_TEACHER * _height(metric, teacher))


def _height(metric: MetricInfo, value: float) -> float:
    low, high = metric.scale
    return value - low if metric.higher_is_better else high - value
