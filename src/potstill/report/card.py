"""The model card: what a reader of the weights must know, with the intervals and not only the best number."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from potstill.core.errors import UserError
from potstill.core.numbers import MISSING, count, decimals, interval, number, size
from potstill.report.html import visible

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
    how_to_load: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    languages: Sequence[str] | None = None,
    tags: Sequence[str] = (),
) -> str:
    """README.md for one model of a report: YAML front matter, verdicts, caveats, results, how to load.

    Args:
        model_row: the model's name in the report.
        note: a sentence about the files beside the card, such as which seed's they are.
        title: heading; the model's name by default.
        path: what `from_pretrained` is to be given in the example.
        how_to_load: Markdown instead of the `transformers` example, for weights that it cannot load.
        license: SPDX identifier; left out of the front matter when not known.
        base_model: Hub name of the model that was trained.
        datasets: Hub names of the training data.
        languages: ISO 639-1 codes; by default those of the test rows.

    Raises:
        UserError: the report has no such model.
    """
    row = next((row for row in report["rows"] if row["name"] == model_row), None)
    if row is None:
        known = ", ".join(row["name"] for row in report["rows"])
        raise UserError(f"the report has no model '{model_row}' (it has: {known})")
    if languages is None:
        languages = sorted({group["group"] for group in report["breakdown"]["language"] if group["group"]})
    metrics = sorted(report["metrics"], key=lambda metric: metric["name"] != report["primary"])
    metrics = [m for m in metrics if any(m["name"] in other["metrics"] for other in report["rows"])]
    heading = title or row["name"]

    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if license:
        front["license"] = license
    if base_model:
        front["base_model"] = base_model
    if languages:
        front["language"] = list(languages)
    if datasets:
        front["datasets"] = list(datasets)
    own = ["distillation"] if row["role"] in ("kd", "quantized") else []
    front["tags"] = list(dict.fromkeys(["potstill", *own, *tags]))
    scored = [(m, row["metrics"][m["name"]]["value"]) for m in metrics if m["name"] in row["metrics"]]
    results = [{"type": m["name"], "name": m["title"], "value": round(value, 4)} for m, value in scored if value is not None]
    if results:
        task = {"type": "text-generation"}
        test = {"type": "test", "name": f"held-out test rows ({report['test_set']['rows']})"}
        front["model-index"] = [{"name": heading, "results": [{"task": task, "dataset": test, "metrics": results}]}]

    # A verdict that compares this model with another, whichever side it stands on; the headline for a KD model and its kin.
    verdicts = [v for v in report["verdicts"] if v["metric"] == report["primary"] and model_row in (v["a"], v["b"])]
    headline = report["headline"]
    kin = row["role"] in ("kd", "sft", "quantized", "rtn")
    sentences = ([headline["sentence"]] if kin else []) + [v["sentence"] for v in verdicts if v != headline["about"]]

    parts = ["---", *_yaml(front), "---", "", f"# {_inline(heading)}", ""]
    parts += ["Made with potstill, which distils a language model and tests whether distilling helped.", ""]
    parts += [note, ""] if note else []
    if sentences:
        parts += ["## What was shown", "", *(f"- {_inline(sentence)}" for sentence in dict.fromkeys(sentences)), ""]
    if report["caveats"]:
        parts += ["Before you believe it:", "", *(f"- {_inline(caveat)}" for caveat in report["caveats"]), ""]
    rows, resamples = report["test_set"]["rows"], report["bootstrap"]["resamples"]
    parts += ["## Results", "", *_table(report, metrics, model_row), ""]
    clusters = report["bootstrap"]["clusters"]
    drawn = f"{rows} test rows" if clusters == rows else f"{clusters} clusters of {rows} test rows"
    parts += [f"95% intervals in brackets: paired bootstrap over {drawn} and the seeds, {resamples:,} resamples.", ""]
    max_new_tokens = report["decoding"].get("max_new_tokens") or 256
    asked = next((example["prompt"] for example in report["examples"] if len(example["prompt"]) <= 200), "Hello")
    question = json.dumps(visible(asked), ensure_ascii=False)  # JSON's text is Python's too
    code = how_to_load or "```python\n" + _LOAD.format(path=path, max_new_tokens=max_new_tokens, question=question) + "```"
    parts += ["## How to load", "", code, ""]
    made = {key: report["provenance"].get(key) for key in ("recipe", "command", "created")}
    if any(made.values()):
        parts += ["## How it was made", "", *(f"- {key}: {_code(value)}" for key, value in made.items() if value), ""]
    return "\n".join(parts).encode("utf-8", "replace").decode("utf-8")


def _table(report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], model_row: str) -> list[str]:
    heads = ["Model", *(f"{m['title']} {'↑' if m['higher_is_better'] else '↓'}" for m in metrics)]
    heads += ["Size", "Parameters", "Trained response tokens", "Seeds"]
    lines = [_line([_inline(head) for head in heads]), _line(["---", *["---:"] * (len(heads) - 1)])]
    for row in report["rows"]:
        name = _inline(row["name"])
        cells = [f"**{name}**" if row["name"] == model_row else name]
        for metric in metrics:
            found = row["metrics"].get(metric["name"])
            if found is None or found["value"] is None:
                cells.append(MISSING)
                continue
            digits = decimals(metric["unit"], found["ci"])
            cells.append(number(found["value"], digits) + (f" {interval(found['ci'], digits)}" if found["ci"] else ""))
        seeds = MISSING if row["seeds"] == [None] else str(len(row["seeds"]))
        lines.append(_line([*cells, size(row["bytes"]), count(row["parameters"]), count(row["response_tokens"]), seeds]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _inline(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no markup, no HTML, no table cell ended early."""
    text = " ".join(visible(text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|~#]|\](?=[(\[:])|!(?=\[))", r"\\\1", text)


def _code(text: Any) -> str:
    text = " ".join(visible(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{text}{fence}" if "`" not in text else f"{fence} {text} {fence}"


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
