"""Ctrl-C at any moment: a word at once, whatever the main thread is doing, and nothing is lost that was saved."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from potstill.core.errors import Interrupted
from potstill.run.stopper import Stopper

# A stage inside one call of C, during which Python's own handlers cannot run: as a backward pass, some seconds long
SCRIPT = """
import hashlib, sys
from pathlib import Path
from potstill.cli import main
from potstill.stages import Stage

class Deaf(Stage, kind="deaf"):
    holds: bool = False

    def run(self, context):
        if self.holds:
            context.work.hold()
        Path("begun").touch()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 6_000_000)
        Path("ended").touch()
        return {}

main(["run", "deaf.toml", "--out", "out", *sys.argv[1:]])
"""
RECIPE = 'name = "deaf"\n[[stage]]\nname = "it"\nkind = "deaf"\nholds = HOLDS\n[[stage]]\nname = "next"\nkind = "deaf"\n'


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def begun(folder: Path, holds: bool, *words: str) -> Iterator[subprocess.Popen[str]]:
    """The recipe, inside its long call."""
    (folder / "deaf.toml").write_text(RECIPE.replace("HOLDS", str(holds).lower()))
    command = [sys.executable, "-c", SCRIPT, *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder) as process:
        wait_for(folder / "begun", process)
        yield process
        process.kill()


@pytest.mark.parametrize("quiet", [(), ("--quiet",)], ids=["lines", "quiet"])
def test_the_answer_does_not_wait_for_the_call_that_runs(tmp_path, quiet):
    with begun(tmp_path, False, *quiet) as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        told = next(line for line in process.stderr if "stopping" in line)
        assert not (tmp_path / "ended").exists(), "said while the call still ran"
        rest = process.stderr.read()
        assert process.wait(60) == 130
    assert told == "stopping\n"
    assert rest.endswith("; what was saved is kept: run the same command again to go on\n")  # or the call had just ended
    assert not list((tmp_path / "out" / "artifacts").glob("[!.]*"))


def test_what_is_to_be_saved_is_saved_first(tmp_path):
    with begun(tmp_path, True, "--quiet") as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.readline() == "stopping: saving first (Ctrl-C again to stop at once)\n"
        assert not (tmp_path / "ended").exists(), "said while the call still ran"
        assert process.stderr.read() == "stopped after it; run the same command again to go on\n"
        assert process.wait(60) == 130
    assert (tmp_path / "ended").exists()
    assert [path.name.partition("-")[0] for path in (tmp_path / "out" / "artifacts").iterdir()] == ["it"]


def test_the_second_time_nothing_is_waited_for(tmp_path):
    with begun(tmp_path, True, "--quiet") as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.readline().startswith("stopping: saving first")
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "stopped at once; what was saved is kept: run the same command again to go on\n"
        assert process.wait(60) == 130
    assert not (tmp_path / "ended").exists()


# In a program that uses the library


def ask() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)  # Python looks at signals between its instructions


def test_without_anything_to_save_a_stop_ends_the_work(capfd):
    stopper = Stopper()
    with pytest.raises(KeyboardInterrupt), stopper.listening():
        ask()
    assert stopper.asked
    assert capfd.readouterr().err == "stopping\n"


def test_work_that_holds_is_asked_and_may_let_a_part_be_interrupted():
    stopper = Stopper()
    with stopper.listening():
        stopper.hold()
        ask()
        assert stopper.asked
        with pytest.raises(KeyboardInterrupt), stopper.interruptible():
            pytest.fail("a part that can be done again is not begun")
        with pytest.raises(Interrupted, match=r"^stopped before it; run the same command again to go on$"):
            stopper.check("before it")


def test_a_second_stop_does_not_wait():
    stopper = Stopper()
    with stopper.listening():
        stopper.hold()
        ask()
        with pytest.raises(KeyboardInterrupt):
            ask()


def test_after_listening_and_while_deaf_signals_are_the_callers_own():
    before = signal.getsignal(signal.SIGINT)
    stopper = Stopper()
    with stopper.listening():
        assert signal.getsignal(signal.SIGINT) != before
        with stopper.deaf():
            assert signal.getsignal(signal.SIGINT) == before
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
    assert not stopper.asked
