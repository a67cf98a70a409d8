"""The sandboxes of this machine."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from potstill.sandbox.backend import Unfit
from potstill.sandbox.bubblewrap import Bubblewrap
from potstill.sandbox.namespaces import Namespaces

BACKENDS = {"namespaces": Namespaces, "bubblewrap": Bubblewrap}


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request):
    """Each sandbox that this machine can have."""
    try:
        backend = BACKENDS[request.param]()
    except Unfit as unfit:
        pytest.skip(f"{request.param}: {unfit}")
    yield backend
    backend.close()
