"""What other processes take of the processor is not counted against a program."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from potstill.core.types import Case
from potstill.sandbox._watch import Run, held_up
from potstill.sandbox.grader import Grader, Task
from potstill.sandbox.trial import made
from potstill.sandbox.verdict import Limits

LIMITS = Limits(time_s=0.8)
BUSY = "import time\nwhile time.process_time() < {busy}: pass\n"
OK = (Case("", "ok"),)
TASKS = {
    "computes": (Task(BUSY.format(busy=0.6) + "print('ok')", OK), "pass"),
    "sleeps and computes": (Task("import time; time.sleep(0.3)\n" + BUSY.format(busy=0.3) + "print('ok')", OK), "pass"),
    "computes for ever": (Task("while True: pass", OK), "timeout"),
    "sleeps for ever": (Task("import time; time.sleep(600)", OK), "timeout"),
}


@pytest.fixture
def load():
    """Three busy processes for each processor."""
    count = 3 * len(os.sched_getaffinity(0))
    hogs = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    yield
    for hog in hogs:
        hog.kill()
        hog.wait()


def test_load_decides_no_verdict(backend, load):
    with Grader(made(backend.name), LIMITS, workers=2) as grader:
        found = grader.grade([task for task, _ in TASKS.values()])
    assert {name: grade.outcome for name, grade in zip(TASKS, found, strict=True)} == {
        name: outcome for name, (_, outcome) in TASKS.items()
    }


FIRST_THREAD_ENDS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
print(flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_program_whose_first_thread_has_ended_and_whose_others_sleep_waits_for_no_processor():
    program = subprocess.Popen([sys.executable, "-S", "-c", FIRST_THREAD_ENDS], stdout=subprocess.PIPE)
    try:
        program.stdout.readline()
        while state(program.pid) != "Z":
            time.sleep(0.01)
        time.sleep(0.1)
        assert not held_up(program.pid)[2]
    finally:
        program.kill()
        program.communicate()


def test_a_program_that_has_ended_and_is_not_waited_for_yet_waits_for_the_processor():
    program = subprocess.Popen([sys.executable, "-S", "-c", ""])
    while state(program.pid) != "Z":
        time.sleep(0.01)
    assert held_up(program.pid)[2]
    program.wait()


MANY_THREADS = """
import hashlib, threading
data = bytes(1 << 24)  # hashed without the interpreter's lock
def work():
    while True:
        hashlib.sha256(data)
for _ in range(16):
    threading.Thread(target=work).start()
print(flush=True)
"""


def test_threads_that_wait_for_each_other_are_not_held_up():
    program = subprocess.Popen([sys.executable, "-S", "-c", MANY_THREADS], stdout=subprocess.PIPE)
    try:
        program.stdout.readline()
        run = Run(LIMITS, kill=program.kill, began=time.monotonic(), pid=program.pid)
        time.sleep(0.5)
        run._look()
        elapsed = time.monotonic() - run.began
        assert run.waited_s == 0 or run.waited_s + run.ran_ns / 1e9 <= elapsed
    finally:
        program.kill()
        program.communicate()
