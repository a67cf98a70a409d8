"""The tables of docs/results.md from a run: python docs/table.py runs/quickstart"""

import json
import sys
from pathlib import Path
from typing import Any


def cell(row: dict[str, Any], metric: dict[str, Any]) -> str:
    found = row["metrics"].get(metric["name"])
    if not found or found["value"] is None:
        return "–"
    digits = 3 if metric["over"] == "tokens" else 1
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


if __name__ == "__main__":
    print(page(json.loads((Path(sys.argv[1]) / "report.json").read_text(encoding="utf-8"))))
