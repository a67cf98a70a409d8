"""The sandboxes of this machine."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from bare import Bare


@pytest.fixture(scope="session", params=["bare"])
def backend(request):
    yield Bare()
