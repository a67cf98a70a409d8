"""A verification in words: for the terminal, and as a section of the model card."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from potstill.core.numbers import scientific
from potstill.report.markdown import code, inline
from potstill.study.records import Study

TITLE = "## Verified"


def figures_in_words(one: Mapping[str, Any]) -> str:
    """`model-f16.gguf KL 1.3e-06, top-1 1.000`, or why the file fails."""
    if "kl" not in one:
        return f"{one['file']} FAILED: {one['why']}"
    told = f"{one['file']} KL {scientific(one['kl'])}, top-1 {one['agreement']:.3f}"
    return told if one["passed"] else f"{told} FAILED: {one['why']}"


def equal_ids(one: Mapping[str, Any]) -> str:
    """`88 of 88`, of a file that was opened."""
    return f"{one['texts'] - len(one['differ']) - len(one['known'])} of {one['texts']}"


def equal_weights(one: Mapping[str, Any]) -> str:
    """`272 of 272`, of a file whose weights were compared one by one."""
    weights = one.get("weights")  # an older record has none
    return "–" if weights is None else f"{weights['count'] - len(weights['differ'])} of {weights['count']}"


def of_exports(study: Study, records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line for each exported file of a study's models: whether it passes, and how far it is from the model.

    Args:
        records: what `verify.json` beside a model's files holds, by the model; empty: the export is older than that.
    """
    lines: list[dict[str, Any]] = []
    for row in study.rows:
        if row.model not in records:
            continue
        record = records[row.model]
        of = {"name": row.name, "role": row.role}
        lines += [{**of, **_figures(one)} for one in record.get("files", ())]
        left_out = record.get("not_verified", {}) if record else {"": "the export is older than verification; export again"}
        lines += [{**of, "file": name, "result": "not opened", "why": why} for name, why in left_out.items()]
    return lines


def _figures(one: Mapping[str, Any]) -> dict[str, Any]:
    found = {"file": one["file"], "result": "passes" if one["passed"] else "fails", "why": one.get("why", "")}
    found |= {key: one.get(key, "") for key in ("runtime", "type")}
    if "kl" not in one:
        return found
    kept = {key: one[key] for key in ("positions", "kl", "kl_max", "agreement", "limit", "own_kl")}
    return {**found, **kept, "ids": equal_ids(one), "weights": equal_weights(one)}


def section(record: Mapping[str, Any]) -> Iterator[str]:
    """Lines of Markdown under `TITLE`."""
    yield from (TITLE, "")
    if record["files"]:
        yield (
            f"Each file was opened in its runtime and compared with {code(record['against'])} on {record['rows']}: the whole "
            "distribution of the next token at each position, and the token ids of texts on which tokenizers disagree."
        )
        yield ""
        yield (
            "| File | Runtime | Result | Mean KL (limit) | Largest KL | Same top token | Positions | Texts with equal ids | "
            "Weights equal to the bit |"
        )
        yield "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
        yield from (_line(one) for one in record["files"])
        yield ""
    for one in record["files"]:
        if not one["passed"]:
            yield from (f"**{code(one['file'])} failed: {inline(one['why'])}. Do not use it.**", "")
        for text, why in one.get("known", {}).items():
            yield from (f"{code(one['file'])} reads {code(repr(text))} otherwise: {inline(why)}.", "")
        if one.get("own_kl") is not None:
            yield from (f"Rounding itself cost {one['own_kl']:.2g} nats at the same positions in {code(one['file'])}.", "")
        if one.get("own_unknown"):
            yield from (f"What rounding itself cost is not known of {code(one['file'])}: {inline(one['own_unknown'])}.", "")
    for name, why in record["not_verified"].items():
        yield from (f"{code(name)} was not verified: {inline(why)}.", "")
    if record["runtimes"]:
        yield from (", ".join(f"{name} {version or 'absent'}" for name, version in record["runtimes"].items()) + ".", "")


def with_section(card: str, record: Mapping[str, Any]) -> str:
    """A card with this record in place of the one that it had; before "How to run" where it had none."""
    lines = "\n".join(section(record))
    found = re.search(rf"^{TITLE}$.*?(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    if found is not None:
        return f"{card[: found.start()]}{lines}\n{card[found.end() :]}"
    begin = card.find("\n## How to run\n")
    return f"{card}\n{lines}\n" if begin < 0 else f"{card[: begin + 1]}{lines}\n{card[begin + 1 :]}"


def _line(one: Mapping[str, Any]) -> str:
    cells = [code(one["file"]), one.get("runtime", "–"), "passed" if one["passed"] else "**failed**"]
    if "kl" in one:
        cells += [f"{scientific(one['kl'])} ({one['limit']:.1g})", scientific(one["kl_max"]), f"{one['agreement']:.3f}"]
        cells += [f"{one['positions']}", equal_ids(one), equal_weights(one)]
    else:
        cells += ["–"] * 6
    return f"| {' | '.join(cells)} |"
