"""The grader that rewards use."""

from collections.abc import Iterator

import pytest
from judged import judging


@pytest.fixture(autouse=True)
def judge() -> Iterator[None]:
    with judging():
        yield
