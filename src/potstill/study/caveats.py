"""What a reader must know before believing the verdicts."""

from collections.abc import Iterator

from potstill.study.controls import equal_tokens, searched_apart, trained_apart
from potstill.study.estimate import Estimate
from potstill.study.records import Study
from potstill.study.verdicts import MIN_CLUSTERS
from potstill.study.words import joined, plain

FEW_CLUSTERS = 30
FEW_SEEDS = 4


def caveats(study: Study, estimates: dict[str, dict[str, Estimate]]) -> Iterator[str]:
    kd, sft = study.with_role("kd"), study.with_role("sft")
    trained = [*kd, *sft]
    once = [row.name for row in trained if len(row.seeds) == 1]
    few = [f"{row.name}: {len(row.seeds)}" for row in trained if 1 < len(row.seeds) < FEW_SEEDS]
    if once:
        were = "was" if len(once) == 1 else "were"
        yield (
            f"{joined(once)} {were} trained with one seed: the intervals speak of the test rows only, not of training luck. "
            "Another seed could turn the verdict."
        )
    if few:
        yield (
            f"Fewer than {FEW_SEEDS} seeds ({', '.join(few)}): they say little about how much training luck varies, "
            "so the intervals are likely too narrow."
        )
    for a in kd:
        for b in sft:
            if a.seeds != b.seeds and max(len(a.seeds), len(b.seeds)) > 1:
                yield f"{a.name} and {b.name} do not have the same seeds, so their training luck is not paired."
            equal = equal_tokens(a, b)
            if equal is None:
                yield (
                    f"Whether {a.name} and {b.name} trained on equally many response tokens is not known: "
                    "a gain may come from more training."
                )
            elif not equal:
                tokens = f"{plain(a.mean_tokens())} against {plain(b.mean_tokens())} response tokens"
                steps = f"{plain(a.mean_steps())} against {plain(b.mean_steps())} optimizer steps"
                yield f"{a.name} and {b.name} are NOT compared at equal tokens: {tokens}, {steps}."
            differ = trained_apart(b, a)
            if differ:
                told = "; ".join(f"{key} {x} against {y}" for key, (x, y) in differ.items())
                yield f"{b.name} and {a.name} were not trained alike: {told}. Part of the difference may come from that."
            for sentence in searched_apart(a, b):
                yield f"{sentence} A search finds better settings, and takes the luckier of equal ones."
    asked = study.prompts
    unlike = [row.name for row in study.rows if (row.trained_with or {}).get("prompts", asked) != asked]
    if asked is not None and unlike:
        yield (
            f"The prompts of this evaluation are not those that {joined(unlike)} trained with: "
            "a model asked in another form than it learned may score lower than it could."
        )
    if kd and not sft:
        yield "There is no SFT-only student: what distilling adds to plain fine-tuning cannot be told from this study."
    if len(kd) > 1 or len(sft) > 1:
        yield (
            "Several KD or SFT models are compared, each at 95% and without correction for it: "
            "where nothing differs, one in twenty such verdicts still claims a difference."
        )
    N = len(study.examples)
    K = study.cluster_count()
    if K < N:
        yield f"{N:,} test rows fall into {K:,} groups that share a key; the bootstrap draws groups."
    if K < FEW_CLUSTERS:
        what, unit = (f"{K} clusters (titles, modules …) of test rows", "clusters") if K < N else (f"{N} test rows", "rows")
        yield f"Only {what}: the intervals are rough, and fewer than {MIN_CLUSTERS} {unit} give no verdict at all."
    for metric in study.metrics:
        found = [
            f"{row.name} {estimate.abstained} of {N * len(row.seeds)}"
            for row in study.rows
            if (estimate := estimates[row.name].get(metric.name)) is not None and estimate.abstained
        ]
        if found:
            yield (
                f"{metric.title} gave no score for some answers ({', '.join(found)}); "
                "these rows are left out of both sides of a comparison, not counted as 0."
            )
    if study.decoding.method == "sample":
        yield (
            f"Answers were sampled at temperature {study.decoding.temperature}, once per row and seed: "
            "the same models would score a little differently on another draw."
        )
    dropped = study.data.get("dropped")
    if isinstance(dropped, dict) and sum(dropped.values()):
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        yield f"{sum(dropped.values())} test rows were dropped before scoring ({reasons})."
