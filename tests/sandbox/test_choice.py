"""A sandbox that does not hold is refused, with the reason; a trial that held is remembered."""

import pytest

from potstill.core.errors import UserError
from potstill.sandbox import trial
from potstill.sandbox.backend import Unfit
from potstill.sandbox.weak import Weak


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "potstill" / "sandbox"


@pytest.fixture(scope="module")
def weak():
    return {probe.what: probe for probe in trial.probe(Weak())}


MISSED = (
    "reads no secret",
    "sees no environment",
    "reaches no socket",
    "writes no file",
    "starts no process",
    "threads are limited",
    "signals nobody",
    "memory is limited",
)


@pytest.mark.parametrize("what", MISSED)
def test_no_sandbox_fails_each_attack(weak, what):
    assert not weak[what].held
    assert weak[what].found not in ("", "held")


def test_what_a_plain_process_does_well(weak):
    assert [what for what, probe in weak.items() if probe.held] == [
        "an honest program passes",
        "time is limited",
        "output is limited",
        "leaves nothing",
    ]


def test_trial_does_no_harm(weak):
    """Even where nothing holds: no file of the probes is left, and no value of the environment is in what was found."""
    from pathlib import Path

    assert not [path for folder in ("/", "/usr", "/dev") for path in Path(folder).glob("potstill-*")]
    assert "=" not in weak["sees no environment"].found


def test_real_ones_hold(backend):
    assert [probe for probe in trial.probe(backend) if not probe.held] == []


def test_remembered_where_it_held(backend, cache, monkeypatch):
    first = trial.tried(backend)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(trial, "probe", lambda backend: pytest.fail("tried again"))
    assert trial.tried(backend) == first
    monkeypatch.setattr(trial, "_sources", lambda: "another version")
    with pytest.raises(pytest.fail.Exception):
        trial.tried(backend)


def test_a_failed_trial_is_not_remembered(cache):
    assert any(not probe.held for probe in trial.tried(Weak()))
    assert not cache.exists()


def test_refusal_says_what_was_tried(monkeypatch):
    class Leaky(Weak):
        pass

    def made(name, workers=None):
        if name == "bubblewrap":
            raise Unfit("bwrap is not installed", "install the system's package bubblewrap")
        return Leaky()

    monkeypatch.setattr(trial, "made", made)
    with pytest.raises(UserError) as refused:
        trial.choose()
    words = str(refused.value)
    assert words.startswith(
        "no sandbox is safe here, so no program is run\n  namespaces: does not hold: reads no secret: read "
    )
    assert "\n  bubblewrap: bwrap is not installed; install the system's package bubblewrap\n" in words
    assert "--unsafe-no-sandbox" in words


def test_choice_by_name():
    assert trial.choose("none").name == "none"
    with pytest.raises(UserError, match=r"^no sandbox is called 'docker'; there are namespaces and bubblewrap$"):
        trial.choose("docker")
    try:
        trial.made("bubblewrap")
    except Unfit as unfit:
        pytest.skip(str(unfit))
    assert trial.choose("bubblewrap").name == "bubblewrap"
