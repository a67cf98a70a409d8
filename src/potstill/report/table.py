"""The results in a terminal."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from potstill.core.numbers import MISSING, count, decimals, interval, number, size
from potstill.report import drafted
from potstill.report.device import lines, page_lines
from potstill.report.html import BADGES, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

Report = Mapping[str, Any]

_STYLES = {"helped": "green", "hurt": "red", "better": "green", "worse": "red"}
_STYLES |= {"not shown": "yellow", "measured": "cyan", "in doubt": "yellow"}
_PLAIN = {
    "\N{NO-BREAK SPACE}": " ",
    "✓": "+",
    "✗": "-",
    "≈": "~",
    "−": "-",
    "–": "-",
    "↑": "^",
    "↓": "v",
    "…": "...",
    "÷": "/",
    "·": "*",
}
_WIDEST = 100
_NO_BREAK = "\N{NO-BREAK SPACE}"  # an arrow stays with its word
_GAP = 2  # blanks between columns
_NAME = 20  # columns that a model's name may take before it is broken into lines
_LEAST_NAME = 12
_FILE = 18  # longest file name shown whole


@dataclass(frozen=True)
class Column:
    """One column of the results: a head and, per model, a value with what stands small beneath it."""

    head: str
    cells: tuple[tuple[str, str], ...]

    @property
    def width(self) -> int:
        """Of its longest line; the head is broken between words only."""
        lines = [line for cell in self.cells for line in cell]
        return max(map(len, [*lines, *self.head.split(" ")]), default=0)

    @property
    def broken_head(self) -> str:
        """The head in lines no longer than the column."""
        return "\n".join(textwrap.wrap(self.head, max(1, self.width), break_long_words=False, break_on_hyphens=False))


def print_table(report: Report, console: "Console") -> None:
    """Print the results, every verdict by the primary metric, what to ship and the caveats; at most 100 columns wide.

    Columns that do not fit are left to the page, the least important first, and named. Output that cannot hold Unicode gets
    ASCII signs.
    """
    width = min(_WIDEST, console.width)
    columns = _columns(report)
    longest = max((len(visible(row["name"])) for row in report["rows"]), default=0)
    names = max(_LEAST_NAME, min(_NAME, longest))
    shown, left = fitting(columns, width - names)
    _print_results(report, shown, console, names)
    if left:
        note = f"Not shown at this width: {', '.join(left)}; the report has them."
        console.print(_text(console, note, "dim"), width=width)
    _print_device(report, console)
    console.print()
    _print_words(report, console, width)


def fitting(columns: Sequence[Column], width: int) -> tuple[list[Column], list[str]]:
    """The columns that fit beside the names, in their order, and the heads of the others.

    Args:
        columns: in the order of importance; the first is always shown.
        width: what is left beside the names.
    """
    shown: list[Column] = []
    for column in columns:
        needed = sum(_GAP + other.width for other in (*shown, column))
        if not shown or needed <= width:
            shown.append(column)
    return shown, [column.head.rstrip(f"{_NO_BREAK}↑↓") for column in columns if column not in shown]


def _columns(report: Report) -> list[Column]:
    """By importance: the primary metric, size, the other metrics, tokens."""
    metrics = sorted(report["metrics"], key=lambda metric: metric["name"] != report["primary"])
    metrics = [m for m in metrics if any(m["name"] in row["metrics"] for row in report["rows"])]
    scores = [
        Column(
            f"{visible(metric['title'])}{_NO_BREAK}{'↑' if metric['higher_is_better'] else '↓'}",
            tuple(_score(row, metric) for row in report["rows"]),
        )
        for metric in metrics
    ]
    sizes = Column("Size", tuple(_size(row) for row in report["rows"]))
    tokens = Column("Trained tokens", tuple((count(row["response_tokens"]), "") for row in report["rows"]))
    return [*scores[:1], sizes, *scores[1:3], tokens, *scores[3:]]


def _score(row: Report, metric: Report) -> tuple[str, str]:
    found = row["metrics"].get(metric["name"])
    if found is None or found["value"] is None:
        return MISSING, ""
    digits = decimals(metric["unit"], found["ci"])
    return number(found["value"], digits), interval(found["ci"], digits) if found["ci"] else ""


def _size(row: Report) -> tuple[str, str]:
    """A size and what has it: a file's name, its ending where the name is long, or that it is of no file."""
    of = visible(row["size"]["of"])
    if row["size"]["bytes"] is None:
        return MISSING, ""
    return size(row["size"]["bytes"]), of if len(of) <= _FILE else f"…{of[1 - _FILE :]}"


def _print_results(report: Report, columns: Sequence[Column], console: "Console", names: int) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 0, 0, _GAP), header_style="bold", pad_edge=False)
    table.add_column("Model", overflow="fold", width=names)
    for column in columns:
        table.add_column(_text(console, column.broken_head), justify="right", no_wrap=True, width=column.width)
    for i, row in enumerate(report["rows"]):
        cells = []
        for column in columns:
            value, beneath = column.cells[i]
            cell = _text(console, value)
            cells.append(cell.append("\n").append_text(_text(console, beneath, "dim")) if beneath else cell)
        name = _text(console, row["name"], "bold" if row["role"] in ("kd", "rl") else "")
        if row.get("equals"):  # an older report does not say
            name.append("\n").append_text(_text(console, f"equals {row['equals']}", "dim"))
        table.add_row(name, *cells)
    console.print(table)


def _print_device(report: Report, console: "Console") -> None:
    """Latency and memory of exported files, where they were measured."""
    from rich.table import Table

    measured = report.get("device") or {}  # an older report has none
    found, pages = lines(measured), page_lines(measured)
    if not found and not pages:
        return
    table = Table(box=None, padding=(0, 0, 0, _GAP), header_style="bold", pad_edge=False)
    table.add_column("On the device", overflow="fold")
    for head in ("file", "memory", "threads", "prompt", "first token", "tokens/s"):
        table.add_column(head, justify="right", no_wrap=True)
    for line in found:
        cells = [size(line["file_bytes"]), size(line["resident_bytes"]), f"{line['threads']}", f"{line['context']}"]
        cells += [line["first"], line["rate"]]
        table.add_row(_text(console, f"{line['name']} {line['type']}"), *(_text(console, cell) for cell in cells))
    console.print()
    if found:
        console.print(table)
    for line in pages:
        told = f"not measured: {line['why']}" if line["why"] else f"{line['rate']} tokens/s, one thread of {line['browser']}"
        where = f"{line['name']} {line['type']} in a browser: {size(line['folder_bytes'])}, {told}"
        console.print(_text(console, where))
    _print_drafts(report, console)


def _print_drafts(report: Report, console: "Console") -> None:
    """Exported files with a smaller model as draft model."""
    from rich.table import Table

    found = drafted.lines(report["device"])
    if not found:
        return
    table = Table(box=None, padding=(0, 0, 0, _GAP), header_style="bold", pad_edge=False)
    table.add_column("With a draft model", overflow="fold")
    for head in ("threads", "alone, tokens/s", "with it", "speed-up", "accepted"):
        table.add_column(head, justify="right", no_wrap=True)
    for line in found:
        cells = [f"{line['threads']}", line["alone"], line["drafted"], line["speed_up"], line["acceptance"]]
        pair = f"{line['name']} {line['type']} by {line['draft_name']} {line['draft_type']}"
        table.add_row(_text(console, pair), *(_text(console, cell) for cell in cells))
    console.print()
    console.print(table)


def _print_words(report: Report, console: "Console", width: int) -> None:
    from rich.table import Table

    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    headline = report["headline"]
    if report["unsafe"]:
        _add_verdict(grid, console, "hurt", report["unsafe"], "bold red")
    _add_verdict(grid, console, headline["shown_as"], headline["sentence"], "bold")
    for verdict in report["verdicts"]:
        if verdict["metric"] == report["primary"] and verdict != headline["about"]:
            _add_verdict(grid, console, verdict["shown_as"], verdict["sentence"], "")
    for sweep in report["sweeps"]:
        grid.add_row(_text(console, "·"), _text(console, sweep["sentence"], "dim"))
    for caveat in report["caveats"]:
        grid.add_row(_text(console, "!", "yellow"), _text(console, caveat, "dim"))
    grid.add_row("", "")
    grid.add_row(_text(console, ">", "bold"), _text(console, report["ship"]["sentence"], "bold"))
    console.print(grid, width=width)
    for file in report["ship"]["files"]:  # not broken into lines: they are there to be copied
        console.print(_text(console, f"  {file['path']}  {size(file['bytes'])}"), soft_wrap=True)
        if file["command"]:
            console.print(_text(console, f"  {file['command']}", "dim"), soft_wrap=True)
    for row in report["rows"]:
        for file in row["files"] if row["name"] != report["ship"]["name"] else ():
            console.print(_text(console, f"  {row['name']}: {file['path']}  {size(file['bytes'])}", "dim"), soft_wrap=True)


def _add_verdict(grid: "Table", console: "Console", shown_as: str, sentence: str, style: str) -> None:
    grid.add_row(_text(console, BADGES[shown_as], f"bold {_STYLES[shown_as]}"), _text(console, sentence, style))


def _text(console: "Console", value: str, style: str = "") -> "Text":
    from rich.text import Text

    value = visible(value)
    if console.options.ascii_only:
        for sign, plain in _PLAIN.items():
            value = value.replace(sign, plain)
        value = value.encode("ascii", "replace").decode("ascii")
    return Text(value, style)
