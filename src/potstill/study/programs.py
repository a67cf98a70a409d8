"""How the programs of answers ended: counted by model, and the test rows that show what training changed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from potstill.study.records import ModelRow, Study
from potstill.study.verdicts import Headline

# outcomes of the sandbox, between answers that pass and those that hold nothing to run
OUTCOMES = ("pass", "fail", "timeout", "memory", "output_limit", "crash", "denied", "no_parse", "no_program", "abstain")
GROUPS = ("gained", "lost", "both pass", "neither passes")
SHOWN = 8


@dataclass(frozen=True)
class Tally:
    """One model's programs by one metric, over all seeds.

    Attributes:
        metric: its name, and `title`.
        counts: outcome -> programs; in the order of OUTCOMES, those that there are.
        programs: all of them; by pass_at_k several of a row.
    """

    name: str
    role: str
    metric: str
    title: str
    counts: dict[str, int]
    programs: int


@dataclass(frozen=True)
class Changed:
    """Test rows by what became of them from one model to another, in the first seed of each.

    Attributes:
        metric: by which they passed.
        a, b: after and before.
        rows: group -> rows, in the order of the test set; rows that the sandbox could not judge are in none.
    """

    metric: str
    a: str
    b: str
    rows: dict[str, list[int]]

    def shown(self) -> list[tuple[int, str]]:
        """Rows to be shown, each with its group: of each group the first ones, by `proportional`."""
        seats = proportional({group: len(rows) for group, rows in self.rows.items()}, SHOWN)
        return [(row, group) for group, rows in self.rows.items() for row in rows[: seats[group]]]


def tallies(study: Study) -> list[Tally]:
    """Of every model by every metric that ran programs."""
    found = []
    for metric in study.metrics:
        for row in study.rows:
            if metric.name in row.outcomes:
                counted = Counter(one for seed in row.outcomes[metric.name] for programs in seed for one in programs)
                order = [*OUTCOMES, *sorted(counted.keys() - set(OUTCOMES))]
                counts = {outcome: counted[outcome] for outcome in order if counted[outcome]}
                found.append(Tally(row.name, row.role, metric.name, metric.title, counts, counted.total()))
    return found


def judging_metric(study: Study) -> str | None:
    """The metric of one program a row that says which answers passed: the primary one where it is such; None: none ran any."""
    names = [metric.name for metric in study.metrics if any(_single(row, metric.name) for row in study.rows)]
    return study.primary if study.primary in names else next(iter(names), None)


def first_outcome(row: ModelRow, metric: str | None, n: int) -> str | None:
    """How the program of a test row's answer ended, in the first seed."""
    return row.outcomes[metric][0][n][0] if metric is not None and _single(row, metric) else None


def changed(study: Study, headline: Headline) -> Changed | None:
    """What became of the test rows between the headline's two models, else the first two; None without two of programs."""
    metric = judging_metric(study)
    if metric is None:
        return None
    able = [row for row in study.rows if _single(row, metric)]
    about = headline.about
    pair = [row for name in (about.b, about.a) for row in able if row.name == name] if about is not None else []
    before, after = pair if len(pair) == 2 else able[:2] if len(able) > 1 else (None, None)
    if before is None or after is None:
        return None
    rows: dict[str, list[int]] = {group: [] for group in GROUPS}
    for n in range(len(study.examples)):
        both = first_outcome(before, metric, n), first_outcome(after, metric, n)
        if "abstain" not in both:
            rows[_group(both[0] == "pass", both[1] == "pass")].append(n)
    return Changed(metric, after.name, before.name, rows)


def proportional(sizes: Mapping[str, int], seats: int) -> dict[str, int]:
    """So many seats for groups in proportion to their sizes, at least one for each that is not empty; none beyond its size."""
    given = {group: min(1, size) for group, size in sizes.items()}
    total = sum(sizes.values())
    while sum(given.values()) < min(seats, total):
        open_ = [group for group in sizes if given[group] < sizes[group]]
        neediest = max(open_, key=lambda group: sizes[group] * seats / total - given[group])
        given[neediest] += 1
    return given


def _group(before: bool, after: bool) -> str:
    return GROUPS[0] if after and not before else GROUPS[1] if before and not after else GROUPS[2] if after else GROUPS[3]


def _single(row: ModelRow, metric: str) -> bool:
    """Whether a metric ran one program of each answer of a model."""
    seeds: Sequence[Sequence[Sequence[str]]] = row.outcomes.get(metric, ())
    return bool(seeds) and all(len(programs) == 1 for programs in seeds[0])
