"""What the backend `namespaces` alone must promise: its warm processes outlive hostile programs, and those who kill them."""

import json
import textwrap
from contextlib import closing

import psutil
import pytest

from potstill.sandbox.backend import Job, Unfit
from potstill.sandbox.namespaces import Namespaces
from potstill.sandbox.verdict import Limits

ROOMY = Limits(time_s=20)
SAYS = "import json\ndef say(x): print(json.dumps(x))\n"


@pytest.fixture(scope="module")
def namespaces():
    """One warm process, so that each run follows the one before in it."""
    try:
        backend = Namespaces(1)
    except Unfit as unfit:
        pytest.skip(str(unfit))
    yield backend
    backend.close()


def ran(namespaces, source):
    ended = namespaces.run(Job(SAYS + textwrap.dedent(source)), ROOMY)
    assert (ended.status, ended.trouble) == (0, ""), ended
    return json.loads(ended.stdout)


def kept(namespaces):
    """The processes that it holds."""
    return {process.pid for process in psutil.Process().children(recursive=True)}


AT_PROCESS_1 = {
    "signals": "for number in range(1, 65): tried(lambda: os.kill(1, number))",
    "signals to a thread": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "for number in range(1, 65): libc.tgkill(1, 1, number); libc.tkill(1, number) if hasattr(libc, 'tkill') else None"
    ),
    "signals to everybody": "signal.signal(signal.SIGTERM, signal.SIG_IGN); tried(lambda: os.kill(-1, signal.SIGTERM))",
    "limits": "import resource\nfor one in range(16): tried(lambda: resource.prlimit(1, one, (0, 0)))",
    "priority": "tried(lambda: os.setpriority(os.PRIO_PROCESS, 1, 19)); tried(lambda: os.setpriority(os.PRIO_USER, 0, 19))",
    "processors": "tried(lambda: os.sched_setaffinity(1, {0}))",
    "scheduler": "tried(lambda: os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0)))",
    "group": "tried(lambda: os.setpgid(1, 0)); tried(lambda: os.killpg(os.getpgid(1), 9))",
}
LOOK = """
    import os, resource
    limits = [resource.getrlimit(one) for one in range(16)]
    say([limits, os.getpriority(os.PRIO_PROCESS, 0), sorted(os.sched_getaffinity(0)), os.sched_getscheduler(0)])
"""


@pytest.mark.parametrize("name", AT_PROCESS_1)
def test_a_program_cannot_touch_the_warm_process(name, namespaces):
    """Neither end it nor change what the next program gets."""
    before, holds = ran(namespaces, LOOK), kept(namespaces)
    head = "import os, signal\ndef tried(act):\n    try: act()\n    except OSError: pass\n"
    namespaces.run(Job(head + AT_PROCESS_1[name]), ROOMY)
    assert ran(namespaces, LOOK) == before
    assert kept(namespaces) == holds


def test_a_program_has_its_three_descriptors_alone(namespaces):
    found = ran(
        namespaces,
        """
        import os
        found = []
        for descriptor in range(4096):
            try: os.fstat(descriptor); found.append(descriptor)
            except OSError: pass
        say(found)
        """,
    )
    assert found == [0, 1, 2]


def test_nothing_can_be_written_but_the_temporary_folder(namespaces):
    """Every folder and mount, by trying."""
    found = ran(
        namespaces,
        """
        import os
        found, tries = [], 0
        for folder, _, _ in os.walk("/"):
            tries += 1
            if folder.startswith("/tmp"): continue
            try: open(folder + "/potstill-left", "w").close(); found.append(folder)
            except OSError: pass
        say([found, tries > 20])
        """,
    )
    assert found == [[], True]


def test_its_input_cannot_be_changed_or_kept(namespaces):
    """The parent's copy of it is sealed, and the next program reads its own."""
    first = namespaces.run(
        Job("import os\ntry: os.write(0, b'x'); print('written')\nexcept OSError: print(os.read(0, 9))", b"one"), ROOMY
    )
    assert first.stdout == b"b'one'\n"
    assert namespaces.run(Job("print(input())", b"two"), ROOMY).stdout == b"two\n"


@pytest.mark.parametrize("which", ["keeper", "zygote"])
def test_a_process_killed_while_idle_is_replaced(which):
    """No program was running, so no run is trouble."""
    before = set(psutil.Process().children())  # other tests' sandboxes may be at work in this process
    try:
        namespaces = Namespaces(1)
    except Unfit as unfit:
        pytest.skip(str(unfit))
    with closing(namespaces):
        _replaced(which, namespaces, before)


def _replaced(which, namespaces, before):
    namespaces.run(Job("print(1)"), ROOMY)
    (keeper,) = set(psutil.Process().children()) - before
    killed = keeper if which == "keeper" else keeper.children()[0]
    killed.kill()
    psutil.wait_procs([killed], timeout=10)
    ended = namespaces.run(Job("print(2)"), ROOMY)
    assert (ended.stdout, ended.trouble) == (b"2\n", "")
    assert keeper.pid not in kept(namespaces)


def test_after_close_there_is_no_process():
    try:
        backend = Namespaces(1)
    except Unfit as unfit:
        pytest.skip(str(unfit))
    before = kept(backend)
    assert len(before) >= 2
    backend.run(Job("print(1)"), ROOMY)
    backend.close()
    assert not any(psutil.pid_exists(pid) for pid in before - {p.pid for p in psutil.Process().children(recursive=True)})
