"""What the benchmarks share: a process for each measurement, engines in turn, spreads, facts of the machine, tables."""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

PEERS = ("trl", "liger_kernel", "accelerate")


def add_output(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--rounds", type=int, default=None, help="how often each measurement has its turn")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--save", type=Path, help="also write that object, with every round, to a file")
    parser.add_argument("--here", action="store_true", help="measure in this process, for a profiler: memory then says little")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a measurement for this process, in JSON


Measure = Callable[[dict[str, Any]], dict[str, Any]]  # a job, as JSON can hold it, and what was found


def runner(script: str, measure: Measure, here: bool) -> Measure:
    """`measure` in a process of its own, or in this one."""
    return measure if here else partial(in_a_process, script)


def in_a_process(script: str, job: dict[str, Any]) -> dict[str, Any]:
    """What `script --one JOB` prints as its last line.

    Raises:
        SystemExit: it failed; says how.
    """
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, script, "--one", json.dumps(job)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{job} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(names: Sequence[Any], rounds: int, measure: Callable[[Any], dict[str, Any]]) -> list[dict[Any, dict[str, Any]]]:
    """A B A B: every name once in each round."""
    found: list[dict[Any, dict[str, Any]]] = []
    for n in range(rounds):
        found.append({})
        for name in names:
            begun = time.monotonic()
            found[n][name] = measure(name)
            said = ", ".join(map(str, name)) if isinstance(name, tuple) else name
            print(f"round {n + 1} of {rounds}: {said}, {time.monotonic() - begun:.0f} s in all", file=sys.stderr)
    return found


def left_out(needs: dict[str, str]) -> set[str]:
    """The engines whose package is missing; a line to a person for each."""
    missing = {engine for engine, module in needs.items() if importlib.util.find_spec(module) is None}
    for engine in sorted(missing):
        print(f"{engine} is left out: not installed (pip install 'potstill[bench]')", file=sys.stderr)
    return missing


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and largest, to six digits."""
    values = list(values)
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def shown(values: Iterable[float], digits: int = 2) -> str:
    """`1.23 [1.20, 1.31]`; one value alone has no spread."""
    values = list(values)
    middle, low, high = (f"{value:,.{digits}f}" for value in spread(values).values())
    return middle if len(values) == 1 else f"{middle} [{low}, {high}]"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """Markdown; the first column is text, the others are numbers."""
    print(f"\n| {' | '.join(head)} |")
    print(f"|---|{'---:|' * (len(head) - 1)}")
    for line in lines:
        print(f"| {' | '.join(line)} |")


def facts() -> dict[str, Any]:
    """The machine, how busy it was when asked, and the versions."""
    from potstill.edges.machine import machine_facts

    found = machine_facts()
    found["machine"]["processor"] = processor()
    if hasattr(os, "getloadavg"):
        found["machine"]["load"] = round(os.getloadavg()[0], 2)
    packages = [name.replace("_", "-") for name in PEERS if importlib.util.find_spec(name)]
    return {**found, "versions": {**found["versions"], **{name: version(name) for name in packages}}}


def hand_over(found: dict[str, Any], rounds: Any, words: argparse.Namespace) -> None:
    """Save with every round, print without."""
    if words.save:
        write(words.save, {**found, "rounds": rounds})
    if words.json:
        print(json.dumps(found))


def write(path: Path, found: dict[str, Any]) -> None:
    """The whole file, or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def processor() -> str:
    """The kind that it calls itself."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def processor_seconds() -> float:
    """Of this process and the children that it has waited for."""
    return sum(os.times()[:4])


def synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


class Memory:
    """Peak bytes above what was there when measuring began: of the GPU where there is one, else resident."""

    def __init__(self) -> None:
        import torch

        self._gpu = torch.cuda.is_available()
        self.again()
        self._before = torch.cuda.memory_allocated() if self._gpu else resident()

    def again(self) -> None:
        """Forget the peak so far, but not where it began."""
        from potstill.edges.machine import reset_peak_memory

        reset_peak_memory()

    def above(self) -> int:
        from potstill.edges.machine import peak_gpu_memory, peak_memory

        return (peak_gpu_memory() if self._gpu else peak_memory()) - self._before
