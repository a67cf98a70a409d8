"""A backend that protects nothing, for tests of the judge alone: a plain interpreter, a time limit, no wall."""

import os
import subprocess
import sys
import threading
import time

from potstill.sandbox.backend import Ended, Job
from potstill.sandbox.verdict import Limits


class Bare:
    name = "bare"

    def run(self, job: Job, limits: Limits) -> Ended:
        ours, theirs = (os.pipe(), os.pipe())
        descriptors = (theirs[0], ours[1])
        program = f"import os\nos.dup2({descriptors[0]}, 3)\nos.dup2({descriptors[1]}, 4)\n" if job.talk else ""
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", program + f"exec(compile({job.program!a}, 'main.py', 'exec'))"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=descriptors,
        )
        for descriptor in descriptors:
            os.close(descriptor)
        talker = threading.Thread(target=self._talk, args=(job, ours[0], theirs[1]))
        talker.start()
        limit = None
        try:
            stdout, stderr = process.communicate(job.stdin, timeout=limits.time_s)
        except subprocess.TimeoutExpired:
            process.kill()
            stdout, stderr = process.communicate()
            limit = "timeout"
        talker.join()
        code = process.returncode
        if len(stdout) > limits.stdout_kb * 1024:
            limit = "output_limit"
        return Ended(
            True,
            limit,
            code if code >= 0 else None,
            -code if code < 0 else None,
            stdout,
            stderr,
            time.monotonic() - began,
        )

    def _talk(self, job: Job, read_from: int, write_to: int) -> None:
        with open(read_from, "rb") as reader, open(write_to, "wb") as writer:
            if job.talk is not None:
                job.talk(reader, writer)

    def close(self) -> None:
        pass
