"""What this machine has, and what is missing for what."""

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.edges.hub import cached_models
from potstill.edges.llamacpp import PACKAGE as RUNTIME
from potstill.edges.llamacpp import runtime_problem
from potstill.edges.machine import PACKAGES, bf16_instructions

if TYPE_CHECKING:
    from rich.table import Table

# package, module, what it is for, what to install
OPTIONAL = (
    ("peft", "peft", "low-rank adapters (adapter = {…})", "'potstill[lora]'"),
    ("xllamacpp", "xllamacpp", "running GGUF files in Python (llama.cpp)", "'potstill[device]'"),
    ("uvicorn", "uvicorn", "potstill serve", "'potstill[serve]'"),
    ("tensorboard", "tensorboard", "log = ['tensorboard']", "'potstill[tensorboard]'"),
)


def findings() -> list[dict[str, Any]]:
    """Rows of name, ok (None: not needed), what was found, and the remedy where something is missing."""
    import psutil
    import torch

    rows: list[dict[str, Any]] = []

    def add(name: str, ok: bool | None, found: str, remedy: str = "") -> None:
        rows.append({"name": name, "ok": ok, "found": found, "remedy": remedy})

    add("python", True, platform.python_version())
    for name in PACKAGES:
        try:
            add(name, True, version(name))
        except PackageNotFoundError:
            add(name, False, "missing", f"pip install {name}")
    add("cores", True, f"{psutil.cpu_count()}, threads used: {torch.get_num_threads()}")
    memory = psutil.virtual_memory()
    add(
        "memory",
        memory.available > 4e9,
        f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free",
        "quickstart needs 4 GB",
    )
    disk = shutil.disk_usage(Path.cwd())
    add("disk here", disk.free > 1e9, f"{disk.free / 1e9:.1f} GB free", "quickstart needs 1 GB")
    add("folder", os.access(Path.cwd(), os.W_OK), f"{Path.cwd()}", "choose a folder you may write to, or --out")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        add(
            "GPU",
            True,
            f"{torch.cuda.get_device_name()}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free",
        )
    else:
        add("GPU", None, "none: small models train on the CPU; the recipes under paper/ want one")
        found = bf16_instructions()
        faster = f"{found}: optim.precision = 'bf16' is faster for pretrained models"
        add("bf16 on the CPU", True if found else None, faster if found else "none: training in float32 is faster here")
    try:
        cache, cached, offline = cached_models()
        add("hub cache", None, f"{cache}: {cached} models{', offline by HF_HUB_OFFLINE' if offline else ''}")
    except ImportError:
        add("hub cache", False, "huggingface_hub is missing", "pip install huggingface_hub")
    for name, module, purpose, remedy in OPTIONAL:
        there = importlib.util.find_spec(module) is not None
        found = version(name) if there else f"missing, only for {purpose}"
        trouble = runtime_problem() if there and name == RUNTIME else None
        add(name, True if there and not trouble else None, trouble or found, f"pip install {remedy}")
    return rows + sandboxes()


def sandboxes() -> list[dict[str, Any]]:
    """Each sandbox, attacked anew: a row like those of `findings`, with what was tried as `probes`."""
    from potstill.sandbox import trial
    from potstill.sandbox.backend import Unfit

    rows: list[dict[str, Any]] = []
    for name in trial.NAMES:
        row = {"name": f"sandbox {name}", "ok": None, "probes": []}
        try:
            backend = trial.made(name)
        except Unfit as unfit:
            rows.append({**row, "found": f"not here: {unfit.why}", "remedy": unfit.remedy})
            continue
        try:
            probes = trial.probe(backend)
        finally:
            backend.close()
        failed = [probe for probe in probes if not probe.held]
        wrong = "; ".join(f"{probe.what}: {probe.found}" for probe in failed)
        found = f"does not hold: {wrong}" if failed else f"held in {len(probes)} trials"
        remedy = "is not used; please report this" if failed else ""
        rows.append({**row, "ok": not failed, "found": found, "remedy": remedy, "probes": [asdict(p) for p in probes]})
    if not any(row["ok"] for row in rows):
        found = "none is safe here: programs that models write are not run"
        rows.append({"name": "sandbox", "ok": False, "found": found, "remedy": "see docs/sandbox.md", "probes": []})
    return rows


def print_findings(rows: list[dict[str, Any]]) -> None:
    """For a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in ("", "what", "found", "remedy"):
        table.add_column(column, overflow="fold")
    for row in rows:
        mark, style = {True: ("✓", "green"), False: ("✗", "red"), None: ("–", "dim")}[row["ok"]]
        remedy = "" if row["ok"] else row["remedy"]
        table.add_row(Text(mark, style), *(Text(text) for text in (row["name"], row["found"], remedy)))
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    if any(row.get("probes") for row in rows):
        console.print(_trials(rows))


def _trials(rows: list[dict[str, Any]]) -> "Table":
    """What each sandbox was tried with."""
    from rich.table import Table
    from rich.text import Text

    tried = [row for row in rows if row.get("probes")]
    table = Table(box=None, pad_edge=False, title="trial of the sandbox", title_justify="left")
    for column in ("", *(row["name"].removeprefix("sandbox ") for row in tried)):
        table.add_column(column)
    for probes in zip(*(row["probes"] for row in tried), strict=True):
        marks = [Text("✓ held", "green") if probe["held"] else Text("✗ does not hold", "red") for probe in probes]
        table.add_row(Text(probes[0]["what"]), *marks)
    return table
