"""What a sandbox costs: `print(1)` in each backend against a bare interpreter, and programs per second.

    python benchmarks/sandbox.py --quick

The bare interpreter is `python -I -S -B` on a file, started and waited for by this process. Times are of one program after
another; `ms_over_bare` is the difference of the medians of one round. Programs per second are of `--workers` threads that keep
the backend busy. Each program's output is compared. The rounds go in turn: load from outside reaches all alike.
"""

import argparse
import os
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from _bench import add_output, facts, hand_over, in_turn, runner, shown, spread, table

PROGRAM, PRINTS = "print(1)\n", b"1\n"
NAMES = ("bare", "namespaces", "bubblewrap")


class Bare:
    """The interpreter alone."""

    version = ""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name) / "main.py"
        self._file.write_text(PROGRAM)

    def once(self) -> bytes:
        from potstill.sandbox.interpreter import executable

        return subprocess.run([executable(), "-I", "-S", "-B", self._file], capture_output=True, env={}).stdout

    def close(self) -> None:
        self._folder.cleanup()


class Sandbox:
    """A backend."""

    def __init__(self, name: str, workers: int) -> None:
        from potstill.sandbox.namespaces import Namespaces
        from potstill.sandbox.trial import made

        self._backend = Namespaces(workers) if name == "namespaces" else made(name)
        self.version = getattr(self._backend, "version", "")

    def once(self) -> bytes:
        from potstill.sandbox.backend import Job
        from potstill.sandbox.verdict import Limits

        ended = self._backend.run(Job(PROGRAM), Limits())
        assert not ended.trouble, ended.trouble
        return ended.stdout

    def close(self) -> None:
        self._backend.close()


def measured(job: dict[str, Any]) -> dict[str, Any]:
    """One program after another, then as many as the workers can."""
    engine = Bare() if job["name"] == "bare" else Sandbox(job["name"], job["workers"])
    try:
        at_once(engine, job["workers"], 5 * job["workers"])  # warm
        seconds = [timed(engine) for _ in range(job["runs"])]
        begun = time.perf_counter()
        at_once(engine, job["workers"], job["runs"])
        return {
            "ms": 1000 * median(seconds),
            "runs_per_s": job["runs"] / (time.perf_counter() - begun),
            "version": engine.version,
        }
    finally:
        engine.close()


def timed(engine: Bare | Sandbox) -> float:
    begun = time.perf_counter()
    assert engine.once() == PRINTS
    return time.perf_counter() - begun


def at_once(engine: Bare | Sandbox, workers: int, runs: int) -> None:
    """Share the runs among threads; an error in one is an error here."""
    errors: list[BaseException] = []

    def work(count: int) -> None:
        try:
            for _ in range(count):
                timed(engine)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=((runs + n) // workers,)) for n in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def here() -> list[str]:
    """The backends that this machine can have, and the bare interpreter."""
    from potstill.sandbox.backend import Unfit
    from potstill.sandbox.trial import made

    found = ["bare"]
    for name in NAMES[1:]:
        try:
            made(name).close()
            found.append(name)
        except Unfit as unfit:
            print(f"{name} is left out: {unfit}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output(parser)
    parser.add_argument("--runs", type=int, default=400, help="programs of each measurement")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads that keep a backend busy")
    parser.add_argument("--quick", action="store_true", help="few rounds: under a minute")
    words = parser.parse_args()
    measure = runner(__file__, measured, words.here)
    if words.one:
        import json

        print(json.dumps(measured(json.loads(words.one))))
        return
    rounds = words.rounds or (3 if words.quick else 7)
    names = here()
    found = in_turn(names, rounds, lambda name: measure({"name": name, "runs": words.runs, "workers": words.workers}))
    backends = {name: of(name, found) for name in names}
    table(
        ("backend", "ms a program", "ms over bare", f"programs a second, {words.workers} workers"),
        [
            (
                name,
                *(
                    shown(one[name][key] - less for one in found for less in [one["bare"]["ms"] if over else 0])
                    for key, over in COLUMNS
                ),
            )
            for name in names
        ],
    )
    hand_over({**facts(), "workers": words.workers, "runs": words.runs, "backends": backends}, found, words)


COLUMNS = (("ms", False), ("ms", True), ("runs_per_s", False))


def of(name: str, found: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    over = [one[name]["ms"] - one["bare"]["ms"] for one in found]
    own = {key: spread(one[name][key] for one in found) for key in ("ms", "runs_per_s")}
    return {**own, "ms_over_bare": spread(over), "version": found[0][name]["version"]}


if __name__ == "__main__":
    main()
