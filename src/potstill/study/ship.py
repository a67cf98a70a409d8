"""Which of the measured models to ship, as far as the figures say."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from potstill.core.numbers import amount, decimals
from potstill.study.bootstrap import unseen
from potstill.study.doubts import Estimates, floored
from potstill.study.questions import COMPARED, source_of
from potstill.study.records import MetricInfo, ModelRow, Study
from potstill.study.verdicts import MIN_CLUSTERS, Verdict
from potstill.study.words import bits_in_words, joined

TOLERABLE = {"0–100": 5.0, "%": 5.0, "nats/token": 0.1}  # a loss still possible at 4 bits, up to which they are recommended


@dataclass(frozen=True)
class Advice:
    """The model to ship.

    Attributes:
        name: the model; None: no measured model can be recommended.
        sentence: which one, and why.
    """

    name: str | None
    sentence: str


def advice(study: Study, verdicts: Sequence[Verdict], estimates: Estimates) -> Advice:
    """The simplest model that no verdict by the primary metric says is worse: 4 bits only where no loss is shown."""
    own = [verdict for verdict in verdicts if verdict.metric == study.primary]
    if study.with_role("candidate") and not study.with_role("kd", "sft"):
        best, why = _of_unbeaten(study, [verdict for verdict in own if verdict.key == COMPARED], estimates)
        return Advice(best.name, f"Ship {best.name}: {why}.") if best is not None else Advice(None, why)
    if study.with_role("rl") and not study.with_role("kd"):
        best, why = _of_unbeaten(study, own, estimates)
        return _packed(study, own, best, why) if best is not None else Advice(None, why)
    full, why = _at_full_precision(study, own, estimates)
    if full is None:
        return Advice(None, why)
    if _gain(study, full, estimates) == -inf:
        return Advice(None, f"Nothing can be recommended: {full.name} has no score by {study.metric(study.primary).title}.")
    for base in study.with_role("base"):
        if full.role != "base" and _no_larger(base, full) and _gain(study, base, estimates) > _gain(study, full, estimates):
            return Advice(base.name, f"Ship {base.name}: it scores higher than {full.name}, the best of the trained students.")
    if full.role != "base" and floored(study, full, full, study.primary, estimates):
        title = study.metric(study.primary).title
        return Advice(
            None,
            f"Ship none of them: {full.name}, the best of the students at full precision, scores near the floor of {title}.",
        )
    return _packed(study, own, full, why)


def _packed(study: Study, verdicts: Sequence[Verdict], full: ModelRow, why: str) -> Advice:
    """The model, or its 4-bit form where that may be shipped."""
    packed, more = _quantised(study, verdicts, full)
    chosen = packed or full
    return Advice(chosen.name, f"Ship {chosen.name}: {why}{more}.")


def _of_unbeaten(study: Study, verdicts: Sequence[Verdict], estimates: Estimates) -> tuple[ModelRow | None, str]:
    """Of models of which none is shown worse than another: the one shown better than all others, else the base or the start.

    A model that a study compares with none is not among them, and neither is the teacher, by which they are measured; 4-bit
    models stand for those that they came from.
    """
    title = study.metric(study.primary).title
    given = study.with_role("base", "start", "candidate", "rl", "sft")
    compared = {name for verdict in verdicts for name in (verdict.a, verdict.b)}
    rows = [row for row in given if _gain(study, row, estimates) > -inf and (row.name in compared or not compared)]
    names = {row.name for row in rows}
    decided = [verdict for verdict in verdicts if verdict.claims and {verdict.a, verdict.b} <= names]
    losers = {verdict.b if verdict.ahead else verdict.a for verdict in decided}
    unbeaten = [row for row in rows if row.name not in losers]
    if not unbeaten:
        return None, f"Nothing can be recommended: no model has a score by {title} that no other is shown better than."
    best = _best(study, unbeaten, estimates)
    if floored(study, best, best, study.primary, estimates):
        return None, f"Ship none of them: {best.name}, the best of them, scores near the floor of {title}."
    beaten = [v for v in decided if (v.a if v.ahead else v.b) == best.name]
    if len(unbeaten) == 1 and beaten:
        over = joined([v.b if v.ahead else v.a for v in beaten])
        doubts = list(dict.fromkeys(doubt for verdict in beaten for doubt in verdict.doubts))
        return best, f"it is better than {over}" + (f", in doubt ({'; '.join(doubts)})" if doubts else "")
    pairs = {frozenset((verdict.a, verdict.b)) for verdict in verdicts}
    for base in study.with_role("base", "start"):
        if base in unbeaten and all(frozenset((base.name, row.name)) in pairs for row in unbeaten if row is not base):
            return base, f"no other model is shown better than it by {title}"
    return best, f"it scores highest of {joined([row.name for row in unbeaten])}, of which none is shown better"


def _at_full_precision(study: Study, verdicts: Sequence[Verdict], estimates: Estimates) -> tuple[ModelRow | None, str]:
    """The student before quantising, and why in words."""
    kd, sft, base = (study.with_role(role) for role in ("kd", "sft", "base"))
    over_sft = [verdict for verdict in verdicts if verdict.key == "kd_over_sft"]
    better = [row for row in kd if _beats_all(row, over_sft)]
    if better:
        best = _best(study, better, estimates)
        own = [verdict for verdict in over_sft if verdict.a == best.name]
        doubts = list(dict.fromkeys(doubt for verdict in own for doubt in verdict.doubts))
        return best, f"it is better than {joined([v.b for v in own])}" + (f", in doubt ({'; '.join(doubts)})" if doubts else "")
    if sft:
        best = _best(study, sft, estimates)
        if not kd:
            return best, "no distilled model was measured beside it"
        names, verb = joined([row.name for row in kd]), "is" if len(kd) == 1 else "are"
        return best, f"{names} {verb} not shown better, and it needs no teacher"
    if kd:
        return None, "Nothing can be recommended: without an SFT-only student nobody knows whether distilling was worth it."
    if base:
        return base[0], "no trained student was measured beside it"
    return None, "Nothing can be recommended: no student was measured."


def _beats_all(row: ModelRow, over_sft: Sequence[Verdict]) -> bool:
    own = [verdict.verdict for verdict in over_sft if verdict.a == row.name]
    return bool(own) and all(verdict == "helped" for verdict in own)


def _best(study: Study, rows: Sequence[ModelRow], estimates: Estimates) -> ModelRow:
    """The best by the primary metric; the first of equal ones."""
    return max(rows, key=lambda row: _gain(study, row, estimates))


def _gain(study: Study, row: ModelRow, estimates: Estimates) -> float:
    """The primary metric's value, turned so that more is better; −∞ where there is none."""
    found = estimates[row.name].get(study.primary)
    return -inf if found is None or found.value is None else study.metric(study.primary).gain(found.value)


def _no_larger(a: ModelRow, b: ModelRow) -> bool:
    return a.parameters is None or b.parameters is None or a.parameters <= 1.01 * b.parameters


def _quantised(study: Study, verdicts: Sequence[Verdict], full: ModelRow) -> tuple[ModelRow | None, str]:
    """The 4-bit form of a model where no loss is shown and none of weight is possible, and what is to be said of 4 bits."""
    own = [verdict for verdict in verdicts if verdict.key == "quantized" and verdict.b == full.name]
    why = ""
    for verdict in own:
        bits = bits_in_words(study.row(verdict.a).bits)
        why, safe = _loss_in_words(study.metric(study.primary), verdict, bits)
        if safe:
            return study.row(verdict.a), f"; at {bits} it is smaller, and {why}"
    if own:
        return None, f"; at full precision, because {why}"
    others = [row.name for row in study.with_role("quantized") if source_of(study, row) is not full]
    return None, f"; its 4-bit form was not measured ({joined(others)} came from another model)" if others else ""


def _loss_in_words(metric: MetricInfo, verdict: Verdict, bits: str) -> tuple[str, bool]:
    """What `bits`, such as "4 bits", cost, and whether that may be shipped."""
    if verdict.ci is None or verdict.clusters < MIN_CLUSTERS:
        return f"{bits} were compared on too few rows", False
    if verdict.verdict == "hurt":
        return f"{bits} hurt", False
    loss = max(0.0, -min(metric.gain(bound) for bound in verdict.ci))
    if verdict.ci == (0, 0) and metric.unit == "%":  # a row is right or wrong: others may differ where none of these does
        loss = unseen(metric, verdict.clusters) or 0.0
    if loss == 0:
        return "no loss is possible within the interval", True
    found = f"a loss of up to {amount(loss, metric, decimals(metric.unit, verdict.ci))} is still possible"
    return f"no loss is shown: {found}", loss <= TOLERABLE.get(metric.unit, 0.0)
