"""A deliberately weak sandbox: a plain interpreter with this process's rights, environment and descriptors.

It is what attacks must break, and what tests of the judge alone run on. Its one limit is the time, four times what is asked:
the backend `none` would withstand the attacks on time, output and descriptors, which must break something too.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from potstill.sandbox.backend import Ended, Job
from potstill.sandbox.verdict import Limits


class Bare:
    name = "bare"

    def run(self, job: Job, limits: Limits) -> Ended:
        requests, answers = os.pipe(), os.pipe()
        head = f"import os; os.dup2({requests[0]}, 3); os.dup2({answers[1]}, 4)\n" if job.talk else ""
        for descriptor in (requests[0], answers[1]):
            os.set_inheritable(descriptor, True)
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-B", "-c", f"{head}exec(compile({job.program!a}, 'main.py', 'exec'))"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            close_fds=False,
            cwd=Path("/tmp"),
        )
        os.close(requests[0])
        os.close(answers[1])
        talker = threading.Thread(target=_talk, args=(job, answers[0], requests[1]))
        talker.start()
        limit = None
        try:
            stdout, stderr = process.communicate(job.stdin, timeout=4 * limits.time_s)
        except subprocess.TimeoutExpired as late:
            process.kill()
            process.wait()
            stdout, stderr, limit = late.stdout or b"", late.stderr or b"", "timeout"
            for pipe in (process.stdin, process.stdout, process.stderr):
                assert pipe is not None
                pipe.close()
        talker.join()
        code, wall_s = process.returncode, time.monotonic() - began
        return Ended(True, limit, code if code >= 0 else None, -code if code < 0 else None, stdout, stderr, wall_s)

    def close(self) -> None:
        pass


def _talk(job: Job, read_from: int, write_to: int) -> None:
    with open(read_from, "rb") as reader, open(write_to, "wb") as writer:
        if job.talk is not None:
            job.talk(reader, writer)
