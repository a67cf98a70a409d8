"""Memory, output and disk."""

# ruff: noqa: E501

import os
from pathlib import Path

from attack import Attack, printed
from processes import LIBC

from potstill.sandbox.verdict import Limits

SMALL = Limits(time_s=2.0, memory_mb=128, disk_mb=2, stdout_kb=64)


def kept_too_much(scene, ended):
    return len(ended.stdout) > SMALL.stdout_kb * 1024


def kept_too_many_errors(scene, ended):
    return len(ended.stderr) > SMALL.stderr_kb * 1024


def in_shared_memory(scene, ended):
    return Path("/dev/shm", f"potstill-{scene.secret}").exists()


def tidy_shared_memory(scene):
    Path("/dev/shm", f"potstill-{scene.secret}").unlink(missing_ok=True)


def tidy_filled(scene):
    for name in ("filled", "sparse"):
        Path("/tmp", f"potstill-{scene.secret}-{name}").unlink(missing_ok=True)


CATCH = "try:\n    {}\n    print('HELD', flush=True)\nexcept MemoryError: pass"

ATTACKS = {
    "pages": Attack(CATCH.format("x = bytearray(300 << 20)"), printed("HELD"), SMALL),
    "pages, one by one": Attack(
        "x = []\nfor _ in range(300):\n    x.append(bytes(1 << 20))\nprint('HELD')", printed("HELD"), SMALL
    ),
    "anonymous map": Attack("import mmap; m = mmap.mmap(-1, 300 << 20); print('HELD')", printed("HELD"), SMALL),
    "shared map": Attack("import mmap; m = mmap.mmap(-1, 300 << 20, mmap.MAP_SHARED); print('HELD')", printed("HELD"), SMALL),
    "memory file": Attack(
        "import os; f = os.memfd_create('x'); os.write(f, bytes(9999)); print('HELD')", printed("HELD"), SMALL
    ),
    "wide pipes": Attack(
        "import fcntl, os\nr, w = os.pipe()\nprint('WIDE', fcntl.fcntl(w, 1031, 1 << 20))", printed("WIDE 1048576"), SMALL
    ),
    "shared memory file": Attack("open('/dev/shm/$MARK', 'wb').write(bytes(99))", in_shared_memory, tidy=tidy_shared_memory),
    "System V memory": Attack(
        LIBC + "i = libc.shmget(0, 1 << 20, 0o1600)\nif i >= 0:\n    print('SEGMENT'); libc.shmctl(i, 0, 0)", printed("SEGMENT")
    ),
    "System V messages": Attack(
        LIBC + "i = libc.msgget(0, 0o1600)\nif i >= 0:\n    print('QUEUE'); libc.msgctl(i, 0, 0)", printed("QUEUE")
    ),
    "System V semaphores": Attack(
        LIBC + "i = libc.semget(0, 1, 0o1600)\nif i >= 0:\n    print('SEMAPHORE'); libc.semctl(i, 0, 0)", printed("SEMAPHORE")
    ),
    "raise the limits": Attack(
        "import resource as r\ntry: r.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY,) * 2)\nexcept (ValueError, OSError): pass\n"
        "x = bytearray(300 << 20)\nprint('HELD')",
        printed("HELD"),
        SMALL,
    ),
    "flood on stdout": Attack("for _ in range(40):\n    print('x' * 9999)", kept_too_much, SMALL),
    "flood on stderr": Attack(
        "import sys\nfor _ in range(40):\n    print('x' * 9999, file=sys.stderr)", kept_too_many_errors, SMALL
    ),
    "flood through another descriptor": Attack(
        "import os\nd = os.dup(1)\nos.close(1)\nfor _ in range(40):\n    os.write(d, b'x' * 9999)", kept_too_much, SMALL
    ),
    "a big file": Attack(
        "f = open('/tmp/$MARK-filled', 'wb')\nfor _ in range(8):\n    f.write(bytes(1 << 20))\nf.flush(); print('FILLED')",
        printed("FILLED"),
        SMALL,
        tidy=tidy_filled,
    ),
    "many files": Attack(
        "import os\nfor i in range(8):\n    p = f'/tmp/$MARK-{i}'\n    f = open(p, 'wb', 0); os.unlink(p)\n    globals()[f'f{i}'] = f\n"
        "    assert f.write(bytes(1 << 20)) == 1 << 20\nprint('FILLED')",
        printed("FILLED"),
        SMALL,
    ),
    "a sparse file": Attack(
        "f = open('/tmp/$MARK-sparse', 'wb')\nf.truncate(1 << 32); print('SPARSE')", printed("SPARSE"), SMALL, tidy=tidy_filled
    ),
    "many descriptors": Attack("import os\nx = [os.dup(0) for _ in range(400)]\nprint('OPEN')", printed("OPEN"), SMALL),
    "a core file's limit": Attack(
        "import resource as r; r.setrlimit(r.RLIMIT_CORE, (r.getrlimit(r.RLIMIT_CORE)[1],) * 2)\n"
        "print('CORE' if r.getrlimit(r.RLIMIT_CORE)[0] else '')",
        printed("CORE"),
    ),
}
assert os.sep == "/"
