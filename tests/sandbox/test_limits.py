"""Limits that no program can run within are refused at once, and the least that are allowed are enough for honest programs."""

import math

import pytest
from pydantic import ValidationError

from potstill.core.errors import UserError
from potstill.sandbox.backend import Job
from potstill.sandbox.verdict import MEMORY_MB, Limits
from potstill.scorers.programs import Judging

WRONG = [
    *(("time_s", value) for value in (0, 0.0, -1, math.nan, math.inf, 3601, "4")),
    *(("memory_mb", value) for value in (0, 8, 31, -512, (1 << 20) + 1, 64.5, math.nan)),
    *((name, value) for name in ("stack_mb", "stdout_kb", "stderr_kb", "disk_mb") for value in (0, -1, 1 << 21)),
    ("descriptors", 3),
    ("stack_mb", True),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_refused(name, value):
    with pytest.raises(UserError, match=rf"^{name} = .*: must be a (whole )?number from \S+ to \d+$"):
        Limits(**{name: value})


IN_A_RECIPE = [one for one in WRONG if one[0] in ("time_s", "memory_mb") and not isinstance(one[1], str)]


@pytest.mark.parametrize(("name", "value"), IN_A_RECIPE)
def test_refused_in_a_recipe(name, value):
    with pytest.raises(ValidationError):
        Judging(**{name: value})


def test_the_least_memory_is_enough(backend):
    source = "import collections, dataclasses, json, math, random, re\nprint(sum(range(100_000)))"
    ended = backend.run(Job(source), Limits(memory_mb=MEMORY_MB[0]))
    assert (ended.stdout, ended.status, ended.trouble) == (b"4999950000\n", 0, "")
