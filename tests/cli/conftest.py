"""A folder to run in, and a finished run."""

import pytest
from tiny_run import Place, set_up


@pytest.fixture
def place(tmp_path) -> Place:
    return set_up(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Place:
    """The same, run once; not to be changed."""
    place = set_up(tmp_path_factory.mktemp("finished"))
    result = place.run("--quiet")
    assert result.exit_code == 0, result.output
    return place
