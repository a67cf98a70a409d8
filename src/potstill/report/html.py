"""`report.html`: one file, no scripts, no network; every word that a model or a data set wrote is escaped."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from potstill.core.numbers import MISSING, count, decimals, duration, estimate, interval, number, scientific, size
from potstill.report import device, drafted, figures
from potstill.study.budget import VALIDATED

SHORT_TEXT = 240  # characters of an answer shown before "more"
MOST_GROUPS = 20
MOST_PREVIEW = 400  # tokens of a mask preview
MARKS = {"right": "✓", "partly": "≈", "wrong": "✗", "differs": "≠", "unscored": "·"}
_FINISHED = ("path:", "hf:")  # models that lie somewhere already, and that no stage of the recipe could export
# sign and words of how a program ended; `scorers/programs.py` and `sandbox/verdict.py` name them
OUTCOMES = {
    "pass": ("✓", "passes"),
    "fail": ("✗", "fails"),
    "timeout": ("…", "timed out"),
    "memory": ("▤", "out of memory"),
    "output_limit": ("»", "too much output"),
    "crash": ("!", "crashed"),
    "denied": ("⊘", "denied by the sandbox"),
    "no_parse": ("¶", "does not parse"),
    "no_program": ("∅", "no program"),
    "abstain": ("·", "could not be judged"),
}
BADGES = {"helped": "✓", "hurt": "✗", "better": "✓", "worse": "✗", "not shown": "≈", "measured": "%", "in doubt": "?"}


def render_html(report: Mapping[str, Any]) -> str:
    """The whole page, from the content of `report.json`.

    Jinja2 escapes all text; the figures alone are inserted as they are, and matplotlib has escaped theirs.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("potstill.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(visible=visible, count=count, size=size, duration=duration)
    environment.globals["visible_folded"] = lambda text: folded(visible(text))
    pictured = set(_first_seeds(report["quantization"]))
    quantized = [
        {
            "about": quantized,
            # one picture per stage: its other seeds look the same, and rounding alone has nothing to be compared with
            "figure": Markup(figures.layer_errors(quantized, f"layers{i}")) if i in pictured else "",
            "mean": _mean_errors(quantized.get("layers") or ()),
        }
        for i, quantized in enumerate(report["quantization"])
    ]
    metrics = {metric["name"]: metric for metric in report["metrics"]}
    return environment.get_template("template.html.j2").render(
        report=report,
        metrics=metrics,
        shown_metrics=[m for m in report["metrics"] if any(m["name"] in row["metrics"] for row in report["rows"])],
        primary=metrics[report["primary"]],
        headline=report["headline"],
        others=[v for v in report["verdicts"] if v["metric"] == report["primary"] and v != report["headline"]["about"]],
        by_metric=_by_metric(report),
        intervals=Markup(figures.intervals(report)),
        curves=Markup(figures.learning_curves(report)),
        own_answers=Markup(figures.own_answers(report)),
        rewards=Markup(figures.rewards(report)),
        outcomes=Markup(figures.outcomes(report)),
        ended=_ended(report["outcomes"]),
        equal=_at_equal(report, metrics),
        sweeps=[
            (sweep, Markup(figures.sweep_curves(report, sweep, f"sweep{i}")), decimals(sweep["unit"]))
            for i, sweep in enumerate(report["sweeps"])
        ],
        size_quality=Markup(figures.size_quality(report)),
        on_device=Markup(figures.on_device(report)),
        draft_lines=drafted.lines(report["device"]),
        device_lines=device.lines(report["device"], device.qualities(report)),
        page_lines=device.page_lines(report["device"], device.qualities(report)),
        answering=[row for row in report["rows"] if row["role"] != "rtn" and _answers(report, row)],
        breakdowns=[
            (by, groups[:MOST_GROUPS], len(groups)) for by in ("tag", "language") if len(groups := report["breakdown"][by]) > 1
        ],
        quantized=quantized,
        of_stage=any(
            row["name"] == report["ship"]["name"] and not row["model"].startswith(_FINISHED) for row in report["rows"]
        ),
        previews=_previews(report["data"]),
        trained=_trained(report["data"]),
        provenance=report["provenance"],
        about=_about(report["provenance"]),
        stages=report["stages"],
        many_seeds=any(len(row["seeds"]) > 1 for row in report["rows"]),
        strip=lambda verdict: _strip(verdict, metrics),
        cell=lambda row, metric: _cell(row, metric),
        change=lambda verdict: _change(verdict, metrics),
        number=number,
        scientific=scientific,
        MARKS=MARKS,
        BADGES=BADGES,
        OUTCOMES=OUTCOMES,
        MISSING=MISSING,
        MOST_PREVIEW=MOST_PREVIEW,
    )


def visible(text: Any) -> str:
    """Text with its invisible characters made visible: controls as pictures, lone surrogates as U+FFFD."""
    shown = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), str(text))
    return re.sub(r"[\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", shown)


def folded(text: str) -> tuple[str, str]:
    """What is shown of a text at once, and the rest (empty when short)."""
    if len(text) <= SHORT_TEXT * 1.25:
        return text, ""
    cut = text.rfind(" ", SHORT_TEXT // 2, SHORT_TEXT)
    cut = cut if cut > 0 else SHORT_TEXT
    return text[:cut], text[cut:]


def _ended(tallies: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[tuple[Mapping[str, Any], list[tuple[int, float]]]]]:
    """The outcomes that there are, in order, and each model's count and per cent of each."""
    kinds = [kind for kind in OUTCOMES if any(tally["counts"].get(kind) for tally in tallies)]
    return kinds, [(tally, [_share(tally, kind) for kind in kinds]) for tally in tallies]


def _share(tally: Mapping[str, Any], kind: str) -> tuple[int, float]:
    return tally["counts"].get(kind, 0), 100 * tally["counts"].get(kind, 0) / max(1, tally["programs"])


def _answers(report: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    return any(row["name"] in example["answers"] for example in report["examples"])


def _cell(row: Mapping[str, Any], metric: Mapping[str, Any]) -> tuple[str, str]:
    """A value and its interval, in as many digits as the interval bears."""
    found = row["metrics"].get(metric["name"])
    if found is None or found["value"] is None:
        return MISSING, ""
    digits = decimals(metric["unit"], found["ci"])
    return number(found["value"], digits), interval(found["ci"], digits) if found["ci"] else ""


def _change(verdict: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """`+2.1 [1.2, 3.0]`, a ratio with its percent sign."""
    if verdict["key"] == "retention":
        digits = decimals("%", verdict["ci"])
        shown = f"{number(verdict['ratio'], digits)}%"
        return shown + (f" {interval(verdict['ci'], digits)}" if verdict["ci"] else "")
    return estimate(verdict["difference"], verdict["ci"], metrics[verdict["metric"]]["unit"], signed=True)


def _strip(verdict: Mapping[str, Any] | None, metrics: Mapping[str, Any]) -> dict[str, float] | None:
    """Where an interval lies against its zero (against 100% for retention), in per cent of the strip; better is right."""
    if verdict is None or verdict["ci"] is None:
        return None
    shift, sign = (100.0, 1) if verdict["key"] == "retention" else (0.0, 1)
    if not metrics[verdict["metric"]]["higher_is_better"]:
        sign = -1
    value = verdict["ratio"] if verdict["key"] == "retention" else verdict["difference"]
    low, value, high = sorted(sign * (x - shift) for x in (*verdict["ci"], value))
    reach = max(abs(low), abs(high)) * 1.12 or 1.0
    at = [round(50 + 50 * x / reach, 2) for x in (low, value, high)]
    return {"low": at[0], "value": at[1], "high": at[2]}


def _by_metric(report: Mapping[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """The questions as lines, the other metrics as columns."""
    others = [m["name"] for m in report["metrics"] if m["name"] != report["primary"]]
    lines: dict[tuple[str, str, str], dict[str, Any]] = {}
    for verdict in report["verdicts"]:
        if verdict["metric"] in others:
            lines.setdefault((verdict["question"], verdict["a"], verdict["b"]), {})[verdict["metric"]] = verdict
    found = [name for name in others if any(name in line for line in lines.values())]
    return found, [{"question": q, "a": a, "b": b, "verdicts": line} for (q, a, b), line in lines.items()]


_PER_STAGE = ("seconds", "peak_memory_bytes", "fingerprints")


def _about(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in the table of facts: all but the command, shown as it was typed, and what has a table by stage."""
    about = {key: value for key, value in provenance.items() if key not in ("command", *_PER_STAGE)}
    return {name: value for name, value in about.items() if value not in (None, "", [], {})}


_AXES = {"tokens": "tokens read and written", "flops": "FLOP"}


def _at_equal(report: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Models of one beginning at equal budgets, where they took different amounts."""
    found = []
    for budget in report["budgets"]:
        if not budget["differ"]:
            continue
        figures = [(name, metrics.get(name.removeprefix(VALIDATED))) for name in budget["figures"]]
        known = [(name, metric) for name, metric in figures if metric is not None]
        arms = [
            {**arm, "cells": [_reached(arm["reached"].get(name), metric["unit"]) for name, metric in known]}
            for arm in budget["arms"]
        ]
        at = f"{count(budget['budget'])} {_AXES[budget['axis']]}"
        found.append({"at": at, "metrics": [metric for _, metric in known], "arms": arms})
    return found


def _reached(found: Mapping[str, float] | None, unit: str) -> tuple[str, str]:
    """A mean, and the least and most over seeds where they differ."""
    if found is None:
        return MISSING, ""
    digits = decimals(unit)
    spread = f"{number(found['low'], digits)} – {number(found['high'], digits)}" if found["low"] < found["high"] else ""
    return number(found["mean"], digits), spread


def _previews(data: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mask previews, equal ones once for all of their stages; line breaks are shown and kept."""
    previews: list[dict[str, Any]] = []
    for stage in data:
        tokens = stage.get("mask_preview") or []
        if not tokens:
            continue
        end = stage.get("end_of_turn")
        name = str(stage.get("stage", ""))
        same = next((p for p in previews if p["all"] == tokens and p["end_of_turn"] == end), None)
        if same is not None:
            same["stages"] = list(dict.fromkeys([*same["stages"], name]))
            continue
        previews.append(
            {
                "stages": [name],
                "all": tokens,
                "tokens": [(visible(token).replace("\n", "⏎\n"), counts) for token, counts in tokens[:MOST_PREVIEW]],
                "end_of_turn": end,
                "taught": any(token == end and counts for token, counts in tokens),
                "cut": len(tokens) if len(tokens) > MOST_PREVIEW else 0,
            }
        )
    return previews


def _trained(data: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Settings, equal ones once for all of their stages."""
    trained: list[dict[str, Any]] = []
    for stage in data:
        settings, name = stage.get("settings") or {}, str(stage.get("stage", ""))
        same = next((t for t in trained if t["settings"] == settings), None)
        if same is not None:
            same["stages"].append(name)
        elif settings:
            trained.append({"stages": [name], "settings": settings})
    return trained


def _first_seeds(quantization: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    """Indices of the first seed of each stage that solved by GPTQ; a model that healing left as it was has its layers."""
    seen: list[Any] = []
    for i, quantized in enumerate(quantization):
        stage, layers = str(quantized.get("stage", "")).partition("@")[0], quantized.get("layers") or ()
        solved = any(layer.get("gptq_error") is not None for layer in layers)
        if solved and stage not in seen and layers not in seen:
            seen += [stage, layers]
            yield i


def _mean_errors(layers: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    both = [
        (layer["gptq_error"], layer["rtn_error"])
        for layer in layers
        if layer.get("gptq_error") is not None and layer.get("rtn_error") is not None
    ]
    return (sum(g for g, _ in both) / len(both), sum(r for _, r in both) / len(both)) if both else None
