"""The results in a terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from potstill.core.numbers import MISSING, count, decimals, interval, number, size
from potstill.report.html import BADGES, visible

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"helped": "green", "hurt": "red", "not shown": "yellow", "measured": "cyan"}
_PLAIN = {"✓": "+", "✗": "-", "≈": "~", "−": "-", "–": "-", "↑": "^", "↓": "v", "…": "...", "÷": "/", "·": "*"}
_MOST_METRICS = 4  # as many as fit in 100 columns beside size and tokens


def print_table(report: Mapping[str, Any], console: "Console") -> None:
    """Print the results table, every verdict by the primary metric, and the caveats; at most 100 columns wide.

    Metrics beyond the fourth are left to the page. Output that cannot hold Unicode gets ASCII signs.
    """
    from rich.table import Table
    from rich.text import Text

    def text(value: str, style: str = "") -> Text:
        value = visible(value)
        if console.options.ascii_only:
            for sign, plain in _PLAIN.items():
                value = value.replace(sign, plain)
            value = value.encode("ascii", "replace").decode("ascii")
        return Text(value, style)

    metrics = sorted(report["metrics"], key=lambda metric: metric["name"] != report["primary"])
    metrics = [m for m in metrics if any(m["name"] in row["metrics"] for row in report["rows"])][:_MOST_METRICS]
    width = min(100, console.width)
    table = Table(box=None, padding=(0, 2, 0, 0), width=width, header_style="bold", pad_edge=False)
    table.add_column("Model", overflow="fold", ratio=1)
    for metric in metrics:
        arrow = "↑" if metric["higher_is_better"] else "↓"
        table.add_column(text(f"{metric['title']} {arrow}"), justify="right", overflow="fold")
    table.add_column("Size", justify="right", no_wrap=True)
    table.add_column("Trained\ntokens", justify="right", no_wrap=True)
    for row in report["rows"]:
        cells = []
        for metric in metrics:
            found = row["metrics"].get(metric["name"])
            if found is None or found["value"] is None:
                cells.append(text(MISSING))
                continue
            digits = decimals(metric["unit"], found["ci"])
            cell = text(number(found["value"], digits))
            if found["ci"]:
                cell = cell.append("\n").append_text(text(interval(found["ci"], digits), "dim"))
            cells.append(cell)
        name = text(row["name"], "bold" if row["role"] == "kd" else "")
        table.add_row(name, *cells, text(size(row["bytes"])), text(count(row["response_tokens"])))
    console.print(table, width=width)
    console.print()

    headline = report["headline"]
    lines = [(headline["verdict"], headline["sentence"], True)]
    for verdict in report["verdicts"]:
        if verdict["metric"] == report["primary"] and verdict != headline["about"]:
            lines.append((verdict["verdict"], verdict["sentence"], False))
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for outcome, sentence, bold in lines:
        style = _STYLES[outcome]
        grid.add_row(text(BADGES[outcome], f"bold {style}"), text(sentence, "bold" if bold else ""))
    for sweep in report.get("sweeps", ()):
        grid.add_row(text("·"), text(sweep["sentence"], "dim"))
    for caveat in report["caveats"]:
        grid.add_row(text("!", "yellow"), text(caveat, "dim"))
    console.print(grid, width=width)
