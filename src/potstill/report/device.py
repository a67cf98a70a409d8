"""Latency and memory of exported files, beside the quality of their models."""

from collections.abc import Mapping
from typing import Any

from potstill.core.numbers import MISSING, decimals, number
from potstill.report import drafted
from potstill.study.records import Study


def on_device(study: Study, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured of files of the study's models, each with its model's name and role; empty where nothing was."""
    rows = {row.model: row for row in study.rows}
    named = {
        kind: [
            {"name": rows[one["model"]].name, "role": rows[one["model"]].role, **one}
            for one in measured.get(kind, ())
            if one["model"] in rows
        ]
        for kind in ("files", "pages")
    }
    drafts = drafted.named(measured.get("drafts", ()), {model: row.name for model, row in rows.items()})
    return {**measured, **named, "drafts": drafts} if any(named.values()) else {}


def lines(found: Mapping[str, Any], values: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """One line for each file, number of threads and length of the prompt.

    Args:
        values: the quality of each model, as it is written, by name.
    """
    made = []
    for one in found.get("files", ()):
        for case in one["latency"]:
            first, rate = case["all_first_s"], case["all_tokens_per_s"]
            made.append(
                {
                    **{key: one[key] for key in ("name", "role", "file", "type")},
                    **one["memory"],
                    "quality": (values or {}).get(one["name"], MISSING),
                    "threads": case["threads"],
                    "context": case["context"],
                    "first": f"{number(case['first_s'], 3)} s",
                    "first_range": f"{number(min(first), 3)} to {number(max(first), 3)}",
                    "rate": number(case["tokens_per_s"], 1),
                    "rate_range": f"{number(min(rate), 1)} to {number(max(rate), 1)}",
                }
            )
    return made


def page_lines(found: Mapping[str, Any], values: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """One line for each page; of one that was not measured "why".

    Args:
        values: as in `lines`.
    """
    made = []
    for one in found.get("pages", ()):
        line = {key: one[key] for key in ("name", "role", "file", "type", "folder_bytes")}
        line |= {"quality": (values or {}).get(one["name"], MISSING), "why": one.get("why", "")}
        if "why" not in one:
            line |= {key: one[key] for key in ("browser", "context", "tokens")}
            for key, name, digits, unit in (
                ("load_s", "load", 1, " s"),
                ("first_s", "first", 2, " s"),
                ("tokens_per_s", "rate", 1, ""),
            ):
                every = one[f"all_{key}"]
                line[name] = f"{number(one[key], digits)}{unit}"
                line[f"{name}_range"] = f"{number(min(every), digits)} to {number(max(every), digits)}"
        made.append(line)
    return made


def qualities(report: Mapping[str, Any]) -> dict[str, str]:
    """Each model's primary figure, as it is written."""
    primary = next(metric for metric in report["metrics"] if metric["name"] == report["primary"])
    found = {row["name"]: row["metrics"].get(primary["name"]) for row in report["rows"]}
    return {name: number(one["value"], decimals(primary["unit"], one["ci"])) for name, one in found.items() if one is not None}
