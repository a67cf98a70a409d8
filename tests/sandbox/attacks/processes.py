"""Processes: new ones, ones that stay, signals to others."""

# ruff: noqa: E501

import os
import signal

from attack import Attack, dropped, printed

from potstill.sandbox.verdict import Limits

SHORT = Limits(time_s=0.4)
LIBC = "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"


def victim_is(*states: str):
    def fired(scene, ended):
        found = scene.victim_state() in states
        os.kill(scene.victim.pid, signal.SIGCONT)
        return found

    return fired


STAYS = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for descriptor in range(64):
            try: os.close(descriptor)
            except OSError: pass
        time.sleep(0.3)
        open("$DROP", "w").write("still here")
    os._exit(0)
"""

ATTACKS = {
    "fork": Attack(
        "import os\nif os.fork() == 0:\n    print('CHILD', flush=True)\n    os._exit(0)\nos.wait()", printed("CHILD")
    ),
    "vfork by the C library": Attack(
        LIBC + "if libc.fork() == 0:\n    import os; os.write(1, b'CHILD'); os._exit(0)\nimport time; time.sleep(0.1)",
        printed("CHILD"),
    ),
    "spawn": Attack(
        "import os, sys\npid = os.posix_spawn(sys.executable, [sys.executable, '-S', '-c', \"print('CHILD')\"], {})\n"
        "os.waitpid(pid, 0)",
        printed("CHILD"),
    ),
    "subprocess": Attack("import subprocess; print(subprocess.check_output(['/bin/echo', 'CHI' + 'LD']))", printed("CHILD")),
    "another program in its place": Attack("import os; os.execv('/bin/echo', ['echo', 'CHI' + 'LD'])", printed("CHILD")),
    "multiprocessing": Attack(
        "import multiprocessing as m\nc = m.get_context('fork')\np = c.Process(target=print, args=('CHILD',))\n"
        "p.start(); p.join()",
        printed("CHILD"),
    ),
    "many forks": Attack(
        "import os\nn = 0\nfor _ in range(40):\n    if os.fork() == 0:\n        os.read(0, 100); os._exit(0)\n    n += 1\n"
        "print('FORKED', n)",
        printed("FORKED 40"),
    ),
    "a process that stays": Attack(STAYS, dropped, wait_s=0.6),
    "kill another": Attack("import os; os.kill($VICTIM, 0); print('ALIVE')", printed("ALIVE")),
    "stop another": Attack("import os, signal; os.kill($VICTIM, signal.SIGSTOP)", victim_is("T"), wait_s=0.05),
    "signal the parent": Attack("import os; os.kill($PARENT, 0); print('PARENT')", printed("PARENT")),
    "signal everybody": Attack("import os; os.killpg(os.getpgid($PARENT), 0); print('GROUP')", printed("GROUP")),
    "trace another": Attack(
        LIBC + "import os\nif libc.ptrace(16, $VICTIM, 0, 0) == 0:\n    print('ATTACHED'); os.waitpid($VICTIM, 0)\n"
        "    libc.ptrace(17, $VICTIM, 0, 0)",
        printed("ATTACHED"),
    ),
    "priority of another": Attack("import os; os.setpriority(os.PRIO_PROCESS, $VICTIM, 5); print('NICED')", printed("NICED")),
    "sleep past the limit": Attack("import time; time.sleep(0.8); print('DONE')", printed("DONE"), limits=SHORT),
    "drip past the limit": Attack(
        "import time\nfor i in range(8):\n    print(i, flush=True); time.sleep(0.1)\nprint('DONE')",
        printed("DONE"),
        limits=SHORT,
    ),
    "signals ignored past the limit": Attack(
        "import signal, time\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "end = time.monotonic() + 0.8\nwhile time.monotonic() < end:\n    pass\nprint('DONE')",
        printed("DONE"),
        limits=SHORT,
    ),
    "inside C past the limit": Attack(
        "x = 7 ** 250_000\nimport time\nb = time.monotonic()\nwhile time.monotonic() < b + 0.8:\n    x % (7 ** 50_000)\nprint('DONE')",
        printed("DONE"),
        limits=SHORT,
    ),
}
