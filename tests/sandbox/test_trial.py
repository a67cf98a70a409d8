"""A sandbox is trusted after it has held against each attack, and each attack finds a sandbox that does not."""

import json
from dataclasses import replace

import pytest

from potstill.core.errors import UserError
from potstill.sandbox import trial
from potstill.sandbox.backend import Ended
from potstill.sandbox.weak import Weak

ALL = [one.what for one in trial._TRIES]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "potstill" / "sandbox"


def missed(probes):
    return {probe.what for probe in probes if not probe.held}


class Broken:
    """A sandbox with one fault: `change` gets job and limits and returns others."""

    name = "broken"

    def __init__(self, backend, change):
        self.backend, self.change = backend, change

    def run(self, job, limits):
        return self.backend.run(*self.change(job, limits))

    def close(self):
        pass


def test_a_sandbox_holds(backend):
    probes = trial.probe(backend)
    assert [(probe.what, probe.found) for probe in probes] == [(what, "held") for what in ALL]


def test_a_plain_process_does_not_and_that_is_not_remembered(cache):
    probes = trial.tried(Weak())
    assert not cache.exists()
    held = {"an honest program passes", "time is limited", "output is limited", "leaves nothing"}
    assert missed(probes) == set(ALL) - held
    found = {probe.what: probe.found for probe in probes}
    assert "secret" in found["reads no secret"]
    assert found["signals nobody"] == "another process was killed"
    assert found["starts no process"] == "a process; a process"


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("memory is limited", lambda job, limits: (job, replace(limits, memory_mb=4096))),
        ("output is limited", lambda job, limits: (job, replace(limits, stdout_kb=1 << 20, time_s=0.5))),
        ("an honest program passes", lambda job, limits: (replace(job, stdin=b"1"), limits)),
        ("leaves nothing", lambda job, limits: (replace(job, program="open('left', 'w').close()\n" + job.program), limits)),
        # an attack that does not run to its end proves nothing
        ("reads no secret", lambda job, limits: (replace(job, program=job.program.replace("print('done')", "")), limits)),
    ],
)
def test_each_fault_is_found(what, change, backend):
    assert what in missed(trial.probe(Broken(backend, change)))


def test_trouble_is_not_holding():
    class Dead:
        name = "dead"

        def run(self, job, limits):
            return Ended(False, "timeout", None, None, b"", b"", 0.0, trouble="it is dead")

        def close(self):
            pass

    probes = trial.probe(Dead())
    assert missed(probes) == set(ALL)
    assert {probe.found for probe in probes} == {"it is dead"}


def test_a_trial_that_held_is_remembered(cache, backend):
    first = trial.tried(backend)
    (file,) = cache.iterdir()
    file.write_text(file.read_text().replace('"held"}', '"remembered"}'))
    assert missed(first) == set()
    assert {probe.found for probe in trial.tried(backend)} == {"remembered"}


@pytest.mark.parametrize(
    "change", [lambda found: [], lambda found: {}, lambda found: found[:-1], lambda found: 3, lambda found: [3]]
)
def test_a_memory_that_is_not_whole_is_not_trusted(cache, change):
    backend = trial.made("namespaces") if _can("namespaces") else pytest.skip("namespaces are not to be had here")
    whole = trial.tried(backend)
    (file,) = cache.iterdir()
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    assert trial.tried(backend) == whole
    backend.close()


def _can(name):
    try:
        trial.made(name).close()
    except trial.Unfit:
        return False
    return True


def test_the_first_that_holds_is_chosen():
    names = [name for name in trial.NAMES if _can(name)]
    if not names:
        pytest.skip("no sandbox is to be had here")
    for wanted in (None, *names):
        backend = trial.choose(wanted)
        backend.close()
        assert backend.name == (wanted or names[0])


def test_none_is_chosen_by_name_alone():
    assert isinstance(trial.choose("none"), Weak)
    assert "none" not in trial.NAMES


@pytest.mark.parametrize("name", ["docker", "", "Namespaces", "none "])
def test_unknown_name(name):
    with pytest.raises(trial.NoSandbox, match=rf"^no sandbox is called {name!r}; there are namespaces and bubblewrap$"):
        trial.choose(name)


def test_where_nothing_works_it_says_what_was_tried(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(UserError) as refused:
        trial.choose()
    lines = str(refused.value).splitlines()
    assert lines[0] == "no sandbox is safe here, so no program is run"
    assert [line.partition(":")[0] for line in lines[1:-1]] == ["  namespaces", "  bubblewrap"]
    assert "--unsafe-no-sandbox" in lines[-1]
