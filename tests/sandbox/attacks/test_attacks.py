"""Hostile programs: each breaks a weak sandbox, and no real one."""

import os

import processes
import pytest
import reaching
import reading
import room
from attack import fires, scene_in
from bare import Bare

ATTACKS = {**processes.ATTACKS, **room.ATTACKS, **reading.ATTACKS, **reaching.ATTACKS}


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    scene = scene_in(tmp_path_factory.mktemp("scene"))
    os.environ["POTSTILL_TEST_KEY"] = scene.secret
    yield scene
    del os.environ["POTSTILL_TEST_KEY"]
    scene.close()


def test_there_are_enough():
    assert len(ATTACKS) >= 40
    assert len(ATTACKS) == sum(len(table.ATTACKS) for table in (processes, room, reading, reaching))


@pytest.mark.parametrize("name", ATTACKS)
def test_breaks_a_weak_sandbox(name, scene):
    if ATTACKS[name].as_root and os.geteuid() != 0:
        pytest.skip("only the superuser can do this, in a weak sandbox too")
    assert fires(ATTACKS[name], Bare(), scene)


@pytest.mark.parametrize("name", ATTACKS)
def test_breaks_no_real_sandbox(name, scene, backend):
    assert not fires(ATTACKS[name], backend, scene)
