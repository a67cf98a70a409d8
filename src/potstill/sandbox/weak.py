"""The backend `none`: a plain process with a time limit. No sandbox: for `--unsafe-no-sandbox`, and for trials to refuse."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from potstill.sandbox._watch import Run, Streams, watch
from potstill.sandbox.backend import Ended, Job
from potstill.sandbox.interpreter import ENVIRONMENT, FLAGS
from potstill.sandbox.verdict import Limits

# the conversation's descriptors into place, by way of numbers that are free; then the program as itself
_START = """
import os, runpy, site, sys
given = [int(fd) for fd in sys.argv[2:]]
spare = [os.dup2(fd, max(given) + 5 + n) for n, fd in enumerate(given)]
for n, fd in enumerate(spare):
    os.dup2(fd, 3 + n)
sys.argv[:] = [os.path.abspath(sys.argv[1])]
sys.path.insert(0, os.getcwd())
site.setquit()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass
class Weak:
    """Programs with all rights of this process: its files, its network, its environment; only time and output are limited."""

    name: str = field(default="none", init=False)

    def run(self, job: Job, limits: Limits) -> Ended:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="potstill-", ignore_cleanup_errors=True)))
            (folder / "main.py").write_bytes(job.program.encode("utf-8", "surrogatepass"))
            streams = stack.enter_context(Streams(job))
            stdin, stdout, stderr, *talk = streams.theirs
            process = subprocess.Popen(
                [sys.executable, *FLAGS, "-c", _START, "main.py", *map(str, talk)],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=talk,
                env={**os.environ, **ENVIRONMENT},
                cwd=folder,
                start_new_session=True,
            )
            streams.handed_over()
            stack.callback(_end, process)
            ended, ending = os.pipe()
            stack.callback(os.close, ended)
            run = Run(limits, kill=partial(_kill, process), began=time.monotonic())
            threading.Thread(target=_wait, args=(process, ending), daemon=True).start()
            return watch(run, streams, {ended: partial(_exited, run, process)})

    def close(self) -> None:
        """Nothing lives longer than a run."""


def _wait(process: "subprocess.Popen[bytes]", ending: int) -> None:
    process.wait()
    os.close(ending)


def _exited(run: Run, process: "subprocess.Popen[bytes]") -> bool:
    code = process.wait()
    run.ended = time.monotonic()
    run.status = -code if code < 0 else code << 8
    return False


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: "subprocess.Popen[bytes]") -> None:
    _kill(process)
    process.wait()
