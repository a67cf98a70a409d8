"""Whether a control was trained like what it controls; asked of the records of training, never of a stage's kind."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from potstill.study.records import ModelRow, Trained
from potstill.study.words import joined, plain

EQUAL_WITHIN = 0.01  # relative; a last, smaller batch makes counts differ by less
_AMOUNTS: dict[str, Callable[[Trained], int]] = {
    "response tokens": lambda trained: trained.response_tokens,
    "optimizer steps": lambda trained: trained.steps,
}
_OF_THE_CONTROL = {
    "data": "training data",
    "rows": "the number of training rows",
    "prompts": "prompts",
    "start": "the model that training began from",
    "init": "how that model was cut",
    "adapter": "which of its weights trained",
}


def mean_amount(row: ModelRow, unit: str) -> float | None:
    """Response tokens or optimizer steps of training, averaged over seeds; None where unknown."""
    return None if not row.trained else sum(map(_AMOUNTS[unit], row.trained)) / len(row.trained)


def equal_tokens(a: ModelRow, b: ModelRow) -> bool | None:
    """Whether both learned from as many response tokens in as many steps, within 1%; None where one's training is unknown."""
    return None if not a.trained or not b.trained else more_training(a, b) is None


def more_training(a: ModelRow, b: ModelRow) -> tuple[str, float, float] | None:
    """The amount in which two trainings differ by more than 1%, and both values: of a seed where both have the same seeds."""
    if not a.trained or not b.trained:
        return None
    for unit, amount in _AMOUNTS.items():
        pairs = [(sum(map(amount, a.trained)) / len(a.trained), sum(map(amount, b.trained)) / len(b.trained))]
        if a.seeds == b.seeds:
            pairs += [(amount(x), amount(y)) for x, y in zip(a.trained, b.trained, strict=True)]
        for x, y in pairs:
            if abs(x - y) > EQUAL_WITHIN * max(x, y):
                return unit, x, y
    return None


def amount_in_words(a: ModelRow, b: ModelRow) -> str:
    """The headline's sentence where two trainings differ in their amount; else nothing."""
    more = more_training(a, b)
    if more is None:
        return ""
    unit, x, y = more
    factor = f"{x / y:.2f} times" if y else "more than"
    return f"This is NOT at equal tokens: {a.name} trained on {factor} the {unit} of {b.name}."


def control_in_words(a: ModelRow, b: ModelRow) -> list[str]:
    """The headline's sentences where the control differs in more than how it was tuned."""
    differ = trained_apart(a, b)
    found = [words for key, words in _OF_THE_CONTROL.items() if key in differ]
    unlike = [f"This is NOT like against like: {b.name} and {a.name} differ in {joined(found)}."] if found else []
    return unlike + taught_wrongly(a, b) + [f"This is NOT equal tuning: {sentence}" for sentence in searched_apart(a, b)]


def taught_wrongly(a: ModelRow, b: ModelRow) -> list[str]:
    """Sentences for a control that a teacher taught, and for a distilled model that none did."""
    sentences = []
    for teacher in dict.fromkeys(trained.teacher for trained in b.trained or () if trained.teacher is not None):
        sentences.append(f"{b.name} is NO control: {teacher} taught it.")
    if any(trained.teacher is None for trained in a.trained or ()):
        sentences.append(f"{a.name} was NOT distilled: no teacher taught it.")
    return sentences


def rollouts_of(row: ModelRow) -> float | None:
    """Answers drawn for a model's training, mean over seeds; None where unknown."""
    return sum(row.rollouts) / len(row.rollouts) if row.rollouts else None


def rolled_apart(a: ModelRow, b: ModelRow) -> bool:
    """Whether the answers drawn for two models' training differ in number by more than 1%, or are not known."""
    x, y = rollouts_of(a), rollouts_of(b)
    return x is None or y is None or abs(x - y) > EQUAL_WITHIN * max(x, y)


def begun_apart(a: ModelRow, b: ModelRow) -> list[str]:
    """In what the control of a rewarded model differs, beside the way of learning itself."""
    return [_OF_THE_CONTROL[key] for key in trained_apart(a, b) if key in ("data", "prompts", "start", "init", "adapter")]


def rollouts_in_words(a: ModelRow, b: ModelRow) -> str:
    """Whether a rewarded model and its control learned from equally many drawn answers, as a sentence."""
    x, y = rollouts_of(a), rollouts_of(b)
    if x is None or y is None:
        return "Whether both learned from equally many drawn answers is not known."
    if rolled_apart(a, b):
        return f"This is NOT at equal rollouts: {a.name} drew {plain(x)} answers, {b.name} {plain(y)}."
    return f"Both at equal rollouts: {plain(x)} answers drawn for each."


def format_in_words(row: ModelRow) -> str:
    """That a model learned the form alone, and in how many seeds; "" where it did not."""
    only, seeds = sum(row.format_only or ()), len(row.format_only or ())
    of = "" if seeds == 1 else " in every seed" if only == seeds else f" in {only} of {seeds} seeds"
    return f"format only: rewards of the form rose{of}, and none that judges correctness did" if only else ""


def other_order(a: ModelRow, b: ModelRow) -> bool:
    """Whether two models of the same seeds and of equally many training rows saw these in another order or other batches."""
    if not a.trained or not b.trained or a.seeds != b.seeds or "rows" in trained_apart(a, b):
        return False
    return any(x.order != y.order for x, y in zip(a.trained, b.trained, strict=True))


def trained_apart(a: ModelRow, b: ModelRow) -> dict[str, tuple[Any, Any]]:
    """Each setting of training in which two models differ, with both values; nothing where one's training is unknown."""
    if not a.trained or not b.trained:
        return {}
    x, y = _settings(a.trained), _settings(b.trained)
    tried = _searched(a), _searched(b)
    alike = [key for key in tried[0] if _same_values(tried[0][key], tried[1].get(key, ()))]
    keys = [key for key in dict.fromkeys((*x, *y)) if not any(key == one or key.startswith(f"{one}.") for one in alike)]
    return {key: (x.get(key, "unset"), y.get(key, "unset")) for key in keys if x.get(key, "unset") != y.get(key, "unset")}


def searched_apart(a: ModelRow, b: ModelRow) -> list[str]:
    """A sentence for each setting that was searched for one of two models and not over the same values for the other.

    Values that a search picked may differ: each method has its own best ones. What must be equal is what was tried.
    """
    if not a.trained or not b.trained:
        return []
    sentences = []
    for key in dict.fromkeys((*_searched(a), *_searched(b))):
        x, y = (_searched(row).get(key, ()) for row in (a, b))
        if _same_values(x, y):
            continue
        more, less, most, least = (a, b, len(x), len(y)) if len(x) >= len(y) else (b, a, len(y), len(x))
        if most == 1:  # one value is no search
            continue
        over = "over other values" if least == most else f"over {_values(least)}"
        theirs = over if least else "was not"
        favours = f": this favours {more.name}" if most > least else ""
        sentences.append(f"{more.name}'s {key} was searched over {_values(most)}, {less.name}'s {theirs}{favours}.")
    return sentences


def _settings(records: Sequence[Trained]) -> dict[str, Any]:
    """What a control must have in common with what it controls, by the recipe's names."""
    found = [
        {
            **{f"optim.{name}": value for name, value in trained.optim.items()},
            "optim.lr": trained.lr,
            **{key: getattr(trained, key) for key in ("data", "rows", "prompts", "start", "init", "adapter")},
        }
        for trained in records
    ]
    return {key: _one([settings.get(key, "unset") for settings in found]) for settings in found for key in settings}


def _one(values: Sequence[Any]) -> Any:
    """The value that all seeds share; a list of each seed's where they do not."""
    return values[0] if all(value == values[0] for value in values) else list(values)


def _searched(row: ModelRow) -> dict[str, list[Any]]:
    """Setting -> the values tried, over all seeds."""
    tried: dict[str, list[Any]] = {}
    for trained in row.trained or ():
        for key, values in trained.searched.items():
            own = tried.setdefault(key, [])
            own += [value for value in _different(values) if value not in own]
    return tried


def _different(values: Iterable[Any]) -> list[Any]:
    """Each value once; they may be tables, which no set holds."""
    kept: list[Any] = []
    for value in values:
        if value not in kept:
            kept.append(value)
    return kept


def _same_values(x: Sequence[Any], y: Sequence[Any]) -> bool:
    """The same ones, in whatever order; they may be tables."""
    return len(x) == len(y) and all(value in y for value in x)


def _values(count: int) -> str:
    return "1 value" if count == 1 else f"{count} values"
