"""From scores to `report.json` and `report.html`. The page and the card are drawn from the JSON's content alone."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from potstill.core.errors import UserError
from potstill.core.numbers import decimals, number
from potstill.report.device import on_device
from potstill.report.ship import shipped_files, size_of
from potstill.report.verified import of_exports
from potstill.scorers.text import exact_form
from potstill.study.analysis import Analysis, analyse, breakdown
from potstill.study.bootstrap import LEVEL
from potstill.study.budget import budgets
from potstill.study.controls import mean_amount
from potstill.study.healing import healing_in_words
from potstill.study.programs import Changed, changed, first_outcome, judging_metric, tallies
from potstill.study.questions import source_of
from potstill.study.records import ModelRow, Study, load_answers, write_json
from potstill.study.ship import Advice
from potstill.study.verdicts import Verdict

SCHEMA = 5  # of report.json
SHOWN_ROWS = 12
LONGEST_TEXT = 4_000  # characters of an answer that the report keeps; the rest stays in answers.jsonl
HALF_THE_WORDS = 50.0  # Rouge-L
LONG_ANSWER = 12  # words: where shared wording begins to say anything; one wrong word makes a short answer wrong


@dataclass(frozen=True)
class Made:
    """How the models of a study were made, as the evaluation kept it beside the scores.

    Attributes:
        curves: per model and seed, {"name", "role", "seed", "points": [{"epoch", "step", "loss", "samples_…",
            "validation_…"}]}; where it is known "spent": what training took, {"read", "written": tokens, "flops"}, which each
            point with a validation has of its own, and "began": equal for models whose validations can be compared, see
            `study/budget.py`.
        data: per training stage and seed, what it saw, with a `mask_preview` of [token, counts in the loss].
        quantization: per quantised model, {"stage", "layers": [{"name", "gptq_error", "rtn_error"}], "bits_per_weight"}.
        sweeps: per swept stage, {"name", "role", "stage", "by", "title", "unit", "higher_is_better": of the figure that picked,
            "fields", "chosen": its number, "candidates": [{"label", "values", "mean", "by_seed": [[seed, figure]], "curves":
            [{"seed", "points"}]}]}.
        cuts: per model that calibration rows cut, {"stage", "by", "rows", "nll": after the cut, and what decided}.
        rewarded: per model and seed that learned from rewards, {"name", "role", "seed", "rewards": {name: {"first", "last",
            "rose", "correctness", "attribution"}}, "format_only"}, see `stages/rewarded.py`.
        written: per stage whose rows a teacher wrote and a model learned, {"stage"} and its summary.
        asked: per prompt of a user's own, {"prompt", "answers": {model name: text}}.
        verified: per exported model, as the study refers to it, what `verify.json` beside its files holds; empty: nothing.
        device: what a `device` stage measured of exported files, see `stages/device.py`; empty: nothing.
        provenance: command, recipe, seeds, versions, machine, fingerprints, created, seconds, peak_memory_bytes.
    """

    curves: Sequence[Mapping[str, Any]] = ()
    data: Sequence[Mapping[str, Any]] = ()
    quantization: Sequence[Mapping[str, Any]] = ()
    sweeps: Sequence[Mapping[str, Any]] = ()
    cuts: Sequence[Mapping[str, Any]] = ()
    rewarded: Sequence[Mapping[str, Any]] = ()
    written: Sequence[Mapping[str, Any]] = ()
    asked: Sequence[Mapping[str, Any]] = ()
    verified: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    device: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


def build_report(
    study: Study, answers: Sequence[Mapping[str, Any]], made: Made | None = None, *, resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Everything the report says, as plain JSON values: no NaN, no NumPy, no tuples.

    Args:
        answers: line i of `answers.jsonl`, {"key": …, "answers": {model name: [one answer per seed]}}.
        made: how the models were made; default: nothing is known.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Raises:
        UserError: the answers do not belong to the study.
    """
    made = made or Made()
    _check(study, answers)
    clusters = study.cluster_count()
    analysis = analyse(study, resamples=resamples, seed=seed)
    rows = [_row(study, row, analysis) for row in study.rows]
    headline = analysis.headline
    about = headline.about if headline.about is not None and headline.about.metric == study.primary else None
    shown = changed(study, headline)
    report = {
        "schema": SCHEMA,
        "primary": study.primary,
        "metrics": [metric.model_dump(mode="json") for metric in study.metrics],
        "headline": {
            "verdict": headline.verdict,
            "shown_as": headline.shown_as,
            "label": headline.label,
            "sentence": headline.sentence,
            "about": _verdict(about) if about is not None else None,
        },
        "ship": _ship(study, analysis.ship),
        "rows": rows,
        "verdicts": [_verdict(verdict) for verdict in analysis.verdicts],
        "caveats": analysis.caveats,
        "judged_by": [one.model_dump(mode="json") for one in study.judged_by],
        "unsafe": study.unsafe_in_words(),
        "outcomes": [asdict(tally) for tally in tallies(study)],
        "changed": _changed(shown),
        "examples": _examples(study, answers, shown),
        "breakdown": {"tag": breakdown(study, "tag"), "language": breakdown(study, "language")},
        "test_set": _test_set(study),
        "decoding": study.decoding.model_dump(mode="json"),
        "bootstrap": {"resamples": resamples, "seed": seed, "level": LEVEL, "clusters": clusters},
        "curves": made.curves,
        "spent": _spent(made.curves),
        "exposure": _exposure(made.curves),
        "budgets": [asdict(budget) for budget in budgets(made.curves)],
        "data": made.data,
        "quantization": made.quantization,
        "cuts": made.cuts,
        "rewarded": made.rewarded,
        "written": made.written,
        "asked": made.asked,
        "verified": of_exports(study, made.verified),
        "device": on_device(study, made.device),
        "sweeps": [{**sweep, "sentence": picked_in_words(sweep)} for sweep in made.sweeps],
        "provenance": made.provenance,
        "stages": _stages(made.provenance),
    }
    return plain(report)


def report_of(
    folder: Path | str, made: Made | None = None, shipped: Mapping[str, tuple[str, dict[str, int]]] | None = None
) -> dict[str, Any]:
    """The report of the study in a folder: `study.json` and `answers.jsonl`. Other arguments and errors as in `build_report`.

    Args:
        shipped: models that were exported: as the study refers to them -> folder, and its files with their bytes.
    """
    study = Study.load(folder)
    for row in study.rows:
        if shipped and row.model in shipped:
            study = study.with_files(row.name, *shipped[row.model])
    return build_report(study, load_answers(folder), made)


def read_report(folder: Path | str) -> dict[str, Any]:
    """Read `report.json` from a folder.

    Raises:
        UserError: there is none, it is damaged, or another version of potstill wrote it.
    """
    path = Path(folder) / "report.json"
    try:
        report = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run the report stage first") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): run the recipe again") from None
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA:
        older = not isinstance(schema, int) or schema < SCHEMA
        raise UserError(f"{path} was made by {'an older' if older else 'a newer'} potstill: run the recipe again")
    return report


def picked_in_words(sweep: Mapping[str, Any]) -> str:
    """Which value a sweep picked, by what, out of which, and whether it lies at their edge."""
    title, digits = sweep["title"], decimals(sweep["unit"])
    order = "highest" if sweep["higher_is_better"] else "lowest"
    candidates = sweep["candidates"]
    chosen = candidates[sweep["chosen"]]
    seeds = len(chosen["by_seed"])
    over = f"mean over {seeds} seeds" if seeds > 1 else "figure"
    tried = ", ".join(f"{row['label']} ({number(row['mean'], digits)})" for row in candidates)
    field = " and ".join(sweep["fields"])
    sentence = f"{sweep['name']}: {field} {chosen['label']} was picked out of {tried}"
    sentence += f": the {order} {over} of {title} on validation rows."
    values = [row["values"].get(field) for row in candidates]
    if len(values) > 1 and all(isinstance(value, int | float) for value in values):
        end = "largest" if values[sweep["chosen"]] == max(values) else "smallest"
        if values[sweep["chosen"]] in (min(values), max(values)):
            sentence += f" It is the {end} value tried: one beyond it may be better still."
    return sentence


def write_report(report: Mapping[str, Any], folder: Path | str) -> tuple[Path, Path]:
    """Write `report.json` (keys sorted) and the self-contained `report.html`; returns their paths."""
    from potstill.report.html import render_html

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(report, folder / "report.json")
    page = folder / "report.html"
    page.write_bytes(render_html(report).encode("utf-8", "replace"))
    return folder / "report.json", page


def plain(value: Any) -> Any:
    """The same value in JSON's own types: NumPy scalars and arrays unpacked, NaN and infinities None, keys sorted strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in sorted(value.items(), key=lambda item: str(item[0]))}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def representative(N: int, shown: int = SHOWN_ROWS) -> list[int]:
    """Row indices evenly spaced over the test set: a choice that nobody made."""
    return list(range(N)) if shown >= N else [(2 * i + 1) * N // (2 * shown) for i in range(shown)]


def mark(
    answer: str,
    references: Sequence[str],
    rouge_l: float | None,
    exact_match: float | None = None,
    language: str = "",
) -> str:
    """What wording can say of an answer, and no more.

    - right: equal to an accepted answer (by exact match, where it was measured).
    - partly: a short accepted answer stands in it word for word, or it shares half the words (Rouge-L ≥ 50) of a long one.
    - wrong: neither, and the accepted answers are short (up to 12 words): one other word is another answer.
    - differs: neither, of long answers, which can be said in many ways.
    - unscored: not equal, and there is nothing to compare by.
    """
    if exact_match == 100 if exact_match is not None else _equal(answer, references, language):
        return "right"
    short = [reference for reference in references if 0 < _length(reference) <= LONG_ANSWER]
    if any(_contains(answer, reference) for reference in short):
        return "partly"
    if short and len(short) == len(references):
        return "wrong"
    if rouge_l is None:
        return "unscored"
    return "partly" if rouge_l >= HALF_THE_WORDS else "differs"


def _equal(answer: str, references: Sequence[str], language: str) -> bool:
    """Where the study did not measure exact match: the same rule."""
    return exact_form(answer, language=language) in {exact_form(reference, language=language) for reference in references}


def _contains(answer: str, reference: str) -> bool:
    """Whether the reference's words stand in the answer one after the other; where words have no blanks between, its text."""
    if _UNSPACED.search(reference):
        return exact_form(reference) in exact_form(answer)
    return f" {_words(reference)} " in f" {_words(answer)} "


def _words(text: str) -> str:
    return " ".join(_STOPS.sub(" ", exact_form(text)).split())


def _length(text: str) -> int:
    """Words; of scripts without blanks, characters."""
    return len(_UNSPACED.findall(text)) or len(text.split())


_STOPS = re.compile(r"[.,;:!?¡¿]+(?=\s|$)")
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


def _spent(curves: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each model's own training took, mean over seeds; None: unknown."""
    found = []
    for name, seeds in _by_model(curves).items():
        taken = [curve["spent"] for curve in seeds if curve.get("spent")]
        if len(taken) == len(seeds):
            means = {key: _mean([each[key] for each in taken]) for key in ("read", "written", "flops")}
            found.append({"name": name, "role": seeds[0]["role"], **means})
    return found


def _exposure(curves: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """KL to the teacher on own answers and on references, at the first and the last validation, mean over seeds."""
    found = []
    for name, seeds in _by_model(curves).items():
        both = [
            [(p["validation_kl_on_answers"], p["validation_kl_to_teacher"]) for p in curve["points"] if _compares(p)]
            for curve in seeds
        ]
        if all(both):
            ends = {}
            for when, at in (("first", 0), ("last", -1)):
                own, data = (math.fsum(line[at][which] for line in both) / len(both) for which in (0, 1))
                ends[when] = {"on_answers": own, "on_references": data, "gap": own - data}
            found.append({"name": name, "role": seeds[0]["role"], **ends})
    return found


def _compares(point: Mapping[str, Any]) -> bool:
    return all(point.get(f"validation_{name}") is not None for name in ("kl_on_answers", "kl_to_teacher"))


def _by_model(curves: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for curve in curves:
        found.setdefault(curve["name"], []).append(curve)
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there and len(there) == len(values) else None


def _stages(provenance: Mapping[str, Any]) -> list[str]:
    """The stages in their own order, which sorted keys would lose."""
    tables = [provenance.get(key) or {} for key in ("seconds", "peak_memory_bytes", "fingerprints")]
    return list(dict.fromkeys(str(name) for table in tables for name in table))


def _check(study: Study, answers: Sequence[Mapping[str, Any]]) -> None:
    if answers and len(answers) != len(study.examples):
        raise UserError(f"answers.jsonl has {len(answers)} lines for {len(study.examples)} test rows; evaluate again")
    for n, (line, example) in enumerate(zip(answers, study.examples, strict=False)):
        if line.get("key") != example.key:
            raise UserError(
                f"answers.jsonl:{n + 1} is row '{line.get('key')}' where study.json has '{example.key}'; evaluate again"
            )


def _row(study: Study, row: ModelRow, analysis: Analysis) -> dict[str, Any]:
    """One model's line: its figures, and the files that it is shipped as."""
    source = source_of(study, row) if row.role in ("quantized", "rtn") else None
    return {
        "name": row.name,
        "role": row.role,
        "model": row.model,
        "source": source.name if source is not None else None,
        "parameters": row.parameters,
        "bytes": row.bytes,
        "size": asdict(size_of(row)),
        "files": [asdict(file) for file in shipped_files(row.files, row.folder)],
        "decode_tokens_per_s": row.decode_tokens_per_s,
        "response_tokens": mean_amount(row, "response tokens"),
        "steps": mean_amount(row, "optimizer steps"),
        "trained": [record.model_dump(mode="json") for record in row.trained or ()],
        "healing": healing_in_words(row.healing) if row.healing else "",
        "equals": row.equals,
        "seeds": row.seeds,
        "metrics": {name: asdict(estimate) for name, estimate in analysis.estimates[row.name].items()},
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {**asdict(verdict), "shown_as": verdict.shown_as}


def _ship(study: Study, advice: Advice) -> dict[str, Any]:
    """Which model, why, and its files with their commands."""
    row = study.row(advice.name) if advice.name is not None else None
    files = shipped_files(row.files, row.folder) if row is not None else []
    return {"name": advice.name, "sentence": advice.sentence, "files": [asdict(file) for file in files]}


def _test_set(study: Study) -> dict[str, Any]:
    """What was evaluated on; what was left out and cut is of test rows alone."""
    return {
        "rows": len(study.examples),
        "response_tokens": sum(study.tokens),
        **{key: value for key, value in study.data.items() if key != "dropped"},
        "clusters": study.cluster_count(),
        "languages": study.languages,
        "left_out": study.left_out,
        "of_rows": study.of_rows,
        "contexts_shortened": study.shortened,
    }


def _changed(found: Changed | None) -> dict[str, Any] | None:
    """Between which models the shown rows are grouped, and how many there are of each group."""
    if found is None:
        return None
    counts = [[group, len(rows)] for group, rows in found.rows.items()]
    return {"metric": found.metric, "a": found.a, "b": found.b, "counts": counts}


def _examples(study: Study, answers: Sequence[Mapping[str, Any]], changed: Changed | None) -> list[dict[str, Any]]:
    """The paper's Table 1; answers are those of the first seed.

    On rows evenly spaced over the test set; where programs were run, on the first rows of each group of `changed`.
    """
    examples = []
    metric = judging_metric(study)
    chosen = changed.shown() if changed is not None else [(n, "") for n in representative(len(study.examples))]
    for n, group in chosen:
        example = study.examples[n]
        given = answers[n].get("answers", {}) if answers else {}
        found = {}
        for row in study.rows:
            texts = given.get(row.name) or []
            if texts and texts[0] is not None:
                rouge_l = _score(row, "rouge_l", n)
                found[row.name] = {
                    "text": _cut(texts[0]),
                    "rouge_l": rouge_l,
                    "outcome": first_outcome(row, metric, n),
                    "mark": mark(texts[0], example.references, rouge_l, _score(row, "exact_match", n), example.language),
                }
        examples.append(
            {
                "row": n,
                "group": group,
                "key": example.key,
                "prompt": _cut(example.prompt),
                "references": [_cut(reference) for reference in example.references],
                "language": example.language,
                "tag": example.tag,
                "answers": found,
            }
        )
    return examples


def _score(row: ModelRow, metric: str, n: int) -> float | None:
    return row.scores[metric][0][n] if metric in row.scores else None


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + f" … [{len(text) - LONGEST_TEXT:,} more characters]"
