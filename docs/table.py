"""The tables of docs/results.md from a run: python docs/table.py runs/quickstart

Of several runs one table with a line for each, by the metric that decides and by NLL.
"""

import json
import sys
from pathlib import Path
from typing import Any

from potstill.core.numbers import decimals


def cell(row: dict[str, Any], metric: dict[str, Any]) -> str:
    found = row["metrics"].get(metric["name"])
    if not found or found["value"] is None:
        return "–"
    digits = decimals(metric["unit"])
    interval = f" [{found['ci'][0]:.{digits}f}, {found['ci'][1]:.{digits}f}]" if found["ci"] else ""
    return f"{found['value']:.{digits}f}{interval}"


def page(report: dict[str, Any]) -> str:
    metrics = report["metrics"]
    lines = [
        "| model | " + " | ".join(metric["title"] for metric in metrics) + " | parameters | size |",
        "|---|" + "---:|" * (len(metrics) + 2),
    ]
    for row in report["rows"]:
        cells = [cell(row, metric) for metric in metrics]
        size = f"{row['parameters'] / 1e6:.2f} M | {row['bytes'] / 1e6:.2f} MB"
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {size} |")
    lines += ["", *(f"- {v['sentence']}" for v in report["verdicts"] if v["metric"] == report["primary"])]
    others = [v["sentence"] for v in report["verdicts"] if v["metric"] != report["primary"] and v["key"] == "kd_over_sft"]
    if others:
        lines += ["", "By the other metrics (exploratory):", "", *(f"- {sentence}" for sentence in others)]
    if report["caveats"]:
        lines += ["", "Caveats that the report prints:", "", *(f"- {caveat}" for caveat in report["caveats"])]
    return "\n".join(lines)


def difference(report: dict[str, Any], key: str, metric: dict[str, Any]) -> str:
    """A comparison in figures; of NLL less is better."""
    found = next((v for v in report["verdicts"] if v["key"] == key and v["metric"] == metric["name"]), None)
    if found is None or found["difference"] is None:
        return "–"
    digits = decimals(metric["unit"])
    low, high = found["ci"]
    return f"{found['difference']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def together(reports: list[dict[str, Any]], name: str) -> str:
    """One line for each run, by one metric."""
    names = list(dict.fromkeys(row["name"] for report in reports for row in report["rows"]))
    lines = ["| run | " + " | ".join(names) + " | teacher − SFT | KD − SFT |", "|---|" + "---:|" * (len(names) + 2)]
    for report in reports:
        metric = next((metric for metric in report["metrics"] if metric["name"] == name), {"name": name, "unit": "0–100"})
        rows = {row["name"]: row["metrics"].get(name) for row in report["rows"]}
        digits = decimals(metric["unit"])
        found = [(rows.get(each) or {}).get("value") for each in names]
        values = ["–" if value is None else f"{value:.{digits}f}" for value in found]
        apart = [difference(report, key, metric) for key in ("teacher_over_sft", "kd_over_sft")]
        lines.append(f"| {report['provenance']['recipe']} | {' | '.join([*values, *apart])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    reports = [json.loads((Path(run) / "report.json").read_text(encoding="utf-8")) for run in sys.argv[1:]]
    if len(reports) == 1:
        print(page(reports[0]))
    else:
        print("\n\n".join(f"By {name}:\n\n{together(reports, name)}" for name in dict.fromkeys((reports[0]["primary"], "nll"))))
