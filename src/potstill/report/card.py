"""The model card: what a reader of the weights must know, with the intervals and not only the best number."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import PurePath
from typing import Any

from potstill.core.errors import UserError
from potstill.core.numbers import MISSING, count, decimals, interval, number, size
from potstill.report.html import OUTCOMES, visible
from potstill.report.markdown import code as _code
from potstill.report.markdown import inline as _inline
from potstill.report.ship import ShippedFile, shipped_files, size_of_files
from potstill.report.tools import tools
from potstill.report.verified import section
from potstill.scorers.language import UNKNOWN
from potstill.study.records import NO_SANDBOX

_LOAD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{path}")
model = AutoModelForCausalLM.from_pretrained("{path}")
messages = [{{"role": "user", "content": {question}}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens={max_new_tokens})[0][inputs["input_ids"].shape[1]:]))
"""


def model_card(
    report: Mapping[str, Any],
    *,
    model_row: str,
    note: str = "",
    title: str | None = None,
    path: str = ".",
    files: Mapping[str, int] | None = None,
    how_to_load: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    languages: Sequence[str] | None = None,
    tags: Sequence[str] = (),
    verified: Mapping[str, Any] | None = None,
) -> str:
    """README.md for one model of a report: YAML front matter, verdicts, caveats, results, how to run and how it was made.

    Args:
        model_row: the model's name in the report.
        note: a sentence about the files beside the card, such as which seed's they are.
        title: heading; the model's name by default.
        path: what `from_pretrained` is to be given in the example.
        files: the files beside the card, name -> bytes; by default those that the report knows of.
        how_to_load: Markdown instead of the `transformers` example, for weights that it cannot load.
        license: SPDX identifier of the base model; not known: the card says so and asks for it.
        base_model: Hub name of the model that was trained; by default what training began from, where that is on the Hub.
        datasets: Hub names of the training data.
        languages: ISO 639-1 codes; by default those of the test rows.
        verified: what comparing the files with the model gave, as `verify.json` holds it.

    Raises:
        UserError: the report has no such model.
    """
    row = next((row for row in report["rows"] if row["name"] == model_row), None)
    if row is None:
        known = ", ".join(row["name"] for row in report["rows"])
        raise UserError(f"the report has no model '{model_row}' (it has: {known})")
    if (here := size_of_files(files or {})) is not None:  # files that the report could not know yet
        rows = [{**one, "size": asdict(here)} if one is row else one for one in report["rows"]]
        report = {**report, "rows": rows}
    metrics = sorted(report["metrics"], key=lambda metric: metric["name"] != report["primary"])
    metrics = [m for m in metrics if any(m["name"] in other["metrics"] for other in report["rows"])]
    heading = title or row["name"]
    beside = shipped_files({file["name"]: file["bytes"] for file in row["files"]} if files is None else files)
    made = _trained(report, row)
    base = base_model or _hub_name(made.get("start"))
    front = _front(report, row, metrics, heading, license, base, datasets, languages, tags)
    parts = ["---", *_yaml(front), "---", "", f"# {_inline(heading)}", ""]
    parts += ["Made with potstill, which distils a language model and tests whether distilling helped.", ""]
    parts += [note, ""] if note else []
    parts += [f"**⚠ {_inline(report['unsafe'])}**", ""] if report["unsafe"] else []
    parts += _shown(report, row)
    parts += ["## Results", "", *_table(report, metrics, model_row), "", _of_the_intervals(report), ""]
    parts += section(verified) if verified is not None else []
    parts += ["## How to run", "", *_how_to_run(report, beside, path, how_to_load, files or {})]
    parts += ["## How it was made", "", *_how_made(report, row, made, base), ""]
    parts += ["## Licence", "", _licence(license, base or made.get("start"), made.get("teacher")), ""]
    return "\n".join(parts).encode("utf-8", "replace").decode("utf-8")


def _front(
    report: Mapping[str, Any],
    row: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    heading: str,
    license: str | None,
    base: str | None,
    datasets: Sequence[str],
    languages: Sequence[str] | None,
    tags: Sequence[str],
) -> dict[str, Any]:
    """The fields that the Hub reads."""
    if languages is None:
        languages = sorted({group["group"] for group in report["breakdown"]["language"]})
    languages = [language for language in languages if language not in ("", UNKNOWN)]  # the Hub knows no such language
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {"license": license} if license else {"license": "other", "license_name": "unknown"}
    if base:
        front["base_model"] = base
    if languages:
        front["language"] = list(languages)
    if datasets:
        front["datasets"] = list(datasets)
    full = next((other for other in report["rows"] if other["name"] == row["source"]), row)
    own = {"kd": ["distillation"], "quantized": ["distillation"], "rl": ["reinforcement-learning"]}.get(full["role"], [])
    front["tags"] = list(dict.fromkeys(["potstill", *own, *tags]))
    scored = [(m, row["metrics"][m["name"]]["value"]) for m in metrics if m["name"] in row["metrics"]]
    results = [{"type": m["name"], "name": m["title"], "value": round(value, 4)} for m, value in scored if value is not None]
    if results:
        task = {"type": "text-generation"}
        test = {"type": "test", "name": f"held-out test rows ({report['test_set']['rows']})"}
        front["model-index"] = [{"name": heading, "results": [{"task": task, "dataset": test, "metrics": results}]}]
    return front


def _shown(report: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """Verdicts that compare this model, whichever side it stands on, the headline for a KD model and its kin; caveats."""
    verdicts = [v for v in report["verdicts"] if v["metric"] == report["primary"] and row["name"] in (v["a"], v["b"])]
    headline = report["headline"]
    kin = row["role"] in ("kd", "rl", "sft", "quantized", "rtn")
    sentences = ([headline["sentence"]] if kin else []) + [v["sentence"] for v in verdicts if v != headline["about"]]
    sentences += [report["ship"]["sentence"]] if kin else []
    parts = []
    if sentences:
        parts += ["## What was shown", "", *(f"- {_inline(sentence)}" for sentence in dict.fromkeys(sentences)), ""]
    if report["caveats"]:
        parts += ["Before you believe it:", "", *(f"- {_inline(caveat)}" for caveat in report["caveats"]), ""]
    return parts


def _of_the_intervals(report: Mapping[str, Any]) -> str:
    rows, clusters = report["test_set"]["rows"], report["bootstrap"]["clusters"]
    drawn = f"{rows} test rows" if clusters == rows else f"{clusters} clusters of {rows} test rows"
    resamples = f"{report['bootstrap']['resamples']:,} resamples"
    return f"95% intervals in brackets: paired bootstrap over {drawn}, Student's t over seeds, {resamples}."


def _how_to_run(
    report: Mapping[str, Any], weights: Sequence[ShippedFile], path: str, how_to_load: str | None, files: Mapping[str, int]
) -> Iterator[str]:
    """People's programs for GGUF files and pages, transformers for a folder; the latter alone where no file is known."""
    yield from tools(files or {file.name: file.bytes for file in weights})
    loadable = [file for file in weights if not file.name.endswith(".gguf")]
    if how_to_load:
        yield from (how_to_load, "")
    elif not weights or loadable:
        asked = next((example["prompt"] for example in report["examples"] if len(example["prompt"]) <= 200), "Hello")
        # JSON's text is Python's too; a row's own tags and fences stay text wherever the card is shown
        question = json.dumps(visible(asked), ensure_ascii=False).replace("<", "\\u003c").replace("`", "\\u0060")
        most = report["decoding"].get("max_new_tokens") or 256
        folders = {str(PurePath(file.name).parent) for file in loadable}
        inner = "" if "." in folders or not folders else min(folders)
        code = _LOAD.format(path=f"{path}/{inner}" if inner else path, max_new_tokens=most, question=question)
        yield from ("With transformers:", "", f"```python\n{code}```", "")


def _how_made(report: Mapping[str, Any], row: Mapping[str, Any], made: Mapping[str, Any], base: str | None) -> Iterator[str]:
    """What it was trained from, by what, on what, with what settings, how it was quantised, and by which recipe."""
    known = {
        "base": base or made.get("start"),
        "teacher": made.get("teacher"),
        "cut": made.get("init"),
        "adapter": made.get("adapter"),
    }
    for key, value in known.items():
        if value not in (None, "none"):
            yield f"- {key}: {_code(value)}"
    if made:
        optim = {"lr": made["lr"], **made["optim"]}
        yield f"- training: {made['rows']:,} rows, {made['steps']:,} steps, {made['response_tokens']:,} response tokens"
        yield f"- settings: {', '.join(f'{key} {_code(value)}' for key, value in optim.items() if value is not None)}"
    for quantized in report["quantization"]:
        if row["model"] == f"stage:{str(quantized.get('stage', '')).partition('@')[0]}":
            bits = quantized.get("bits_per_weight")
            method = _inline(quantized.get("method") or "rounding")
            yield f"- quantised: {method}" + (f", {bits:.2f} bits per weight" if bits is not None else "")
            break
    if row.get("healing"):
        yield f"- {_inline(row['healing'])}"
    yield from _programs(report, row)
    for key in ("recipe", "command", "created"):
        if report["provenance"].get(key):
            yield f"- {key}: {_code(report['provenance'][key])}"


def _programs(report: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[str]:
    """How this model's programs ended on the test rows, and what ran them."""
    for tally in report["outcomes"]:
        if tally["name"] == row["name"]:
            counts = ", ".join(
                f"{tally['counts'][kind]:,} {words}" for kind, (_, words) in OUTCOMES.items() if kind in tally["counts"]
            )
            yield f"- {_inline(tally['title'])}, of {tally['programs']:,} programs: {counts}"
    for one in report["judged_by"]:
        what = "no sandbox" if one["backend"] == NO_SANDBOX else f"sandbox {_code(one['backend'])} ({_inline(one['version'])})"
        yield f"- programs of the test answers run by: {what}, Python {_inline(one['python'])}"


def _trained(report: Mapping[str, Any], row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record of training of a model's first seed, of a quantised one that of the model it came from; empty if unknown."""
    source = next((other for other in report["rows"] if other["name"] == row["source"]), None)
    records = row["trained"] or (source["trained"] if source is not None else [])
    return records[0] if records else {}


def _hub_name(start: str | None) -> str | None:
    """`Qwen/Qwen2.5-0.5B` of `hf:Qwen/Qwen2.5-0.5B`; None of what lies elsewhere."""
    return start.removeprefix("hf:").partition("@")[0] if start is not None and start.startswith("hf:") else None


def _licence(license: str | None, base: str | None, teacher: str | None) -> str:
    of_teacher = f" The terms of its teacher, {_code(teacher)}, may bind it too." if teacher else ""
    if license:
        return f"{_code(license)}, that of the base model.{of_teacher}"
    whose = f"of its base model, {_code(base)}," if base else "of its base model"
    return f"Not known. Before you publish this model, look up the licence {whose} and name it in `license` above.{of_teacher}"


def _table(report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], model_row: str) -> list[str]:
    heads = ["Model", *(f"{m['title']} {'↑' if m['higher_is_better'] else '↓'}" for m in metrics)]
    heads += ["Size", "Parameters", "Trained response tokens", "Seeds"]
    lines = [_line([_inline(head) for head in heads]), _line(["---", *["---:"] * (len(heads) - 1)])]
    for row in report["rows"]:
        name = _inline(row["name"])
        equals = f" (equals {_inline(row['equals'])})" if row.get("equals") else ""  # an older report does not say
        cells = [(f"**{name}**" if row["name"] == model_row else name) + equals]
        for metric in metrics:
            found = row["metrics"].get(metric["name"])
            if found is None or found["value"] is None:
                cells.append(MISSING)
                continue
            digits = decimals(metric["unit"], found["ci"])
            cells.append(number(found["value"], digits) + (f" {interval(found['ci'], digits)}" if found["ci"] else ""))
        seeds = MISSING if row["seeds"] == [None] else str(len(row["seeds"]))
        lines.append(_line([*cells, _size(row), count(row["parameters"]), count(row["response_tokens"]), seeds]))
    return lines


def _size(row: Mapping[str, Any]) -> str:
    """A size, and the file that has it."""
    found = row["size"]
    return MISSING if found["bytes"] is None else f"{size(found['bytes'])} ({_inline(found['of'])})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _yaml(value: Any, indent: int = 0) -> list[str]:
    """YAML of plain values; every string is quoted as in JSON, which YAML reads the same."""
    pad = "  " * indent
    lines = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += [f"{pad}{key}:", *_yaml(item, indent + 1)]
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            lines.append(f"{pad}{key}:")
            for entry in item:
                nested = _yaml(entry, indent + 1)
                lines += [f"{pad}- {nested[0].lstrip()}", *nested[1:]]
        elif isinstance(item, list):
            lines += [f"{pad}{key}:", *(f"{pad}- {_scalar(entry)}" for entry in item)]
        else:
            lines.append(f"{pad}{key}: {_scalar(item)}")
    return lines


def _scalar(value: Any) -> str:
    return json.dumps(visible(value) if isinstance(value, str) else value, ensure_ascii=False)
