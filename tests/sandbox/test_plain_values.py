"""Values between judge and program: what crosses comes back the same, and nothing else comes back."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.sandbox._values import DEPTH, NotPlain, message, packed, parsed, unpacked

ATOMS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**5000, 10**5001)
    | st.floats(allow_nan=False)
    | st.text(st.characters())
    | st.binary()
    | st.complex_numbers(allow_nan=False)
)
KEYS = st.recursive(
    ATOMS, lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3), max_leaves=5
)
VALUES = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.sets(KEYS, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=20,
)


def nothing(*_):
    raise NotPlain("not here")


def crossed(value):
    return unpacked(parsed(message(packed(value, nothing))), nothing)


def same(one, other) -> bool:
    """Equal, and of one type all the way down: True is not 1 here, nor 1.0."""
    if type(one) is not type(other) or one != other:
        return False
    if isinstance(one, list | tuple):
        return all(map(same, one, other))
    if isinstance(one, dict):
        return all(map(same, one, other)) and all(map(same, one.values(), other.values()))
    return not isinstance(one, float | complex) or repr(one) == repr(other)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(VALUES)
def test_what_crosses_comes_back_the_same(value):
    assert same(crossed(value), value)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, complex(math.nan, -math.inf), 2**53, -(2**53) + 1, -0.0])
def test_rare_numbers(value):
    assert repr(crossed(value)) == repr(value)


def test_a_subclass_crosses_by_its_content():
    class Liar(int):
        def __eq__(self, other):
            return True

        __hash__ = None

    class Words(list):
        def __iter__(self):
            return iter(["other"])

    assert same(crossed(Liar(3)), 3)
    assert same(crossed(Words([1, 2])), [1, 2])
    assert same(crossed(bytearray(b"ab")), b"ab")


def test_what_holds_itself_does_not_cross():
    ring = []
    ring.append(ring)
    with pytest.raises(NotPlain, match="nested"):
        packed(ring, nothing)


def test_depth_is_bounded_on_both_sides():
    value = packed([], nothing)
    for _ in range(DEPTH):
        value = ["list", [value]]
    with pytest.raises(NotPlain, match="nested"):
        unpacked(value, nothing)


def test_size_is_bounded():
    with pytest.raises(NotPlain, match="more than 8 MiB"):
        message(packed("x" * (9 << 20), nothing))


@pytest.mark.parametrize(
    "line",
    [
        b"1",
        b"\n",
        b"nan\n",
        b"NaN\n",
        b"Infinity\n",
        b"[1\n",
        b"'a'\n",
        b"\xff\n",
        "é\n".encode(),
        b"[" * 100_000 + b"\n",
        b"9" * 5000 + b"\n",
    ],
    ids=lambda line: repr(line[:12]),
)
def test_what_is_no_message(line):
    with pytest.raises(NotPlain):
        parsed(line)


@pytest.mark.parametrize(
    "data",
    [
        [],
        ["list"],
        ["list", 3],
        ["list", "ab"],
        ["list", {}],
        ["set", [["list", []]]],
        ["dict", [[1]]],
        ["dict", [[["list", []], 1]]],
        ["dict", 3],
        ["int", 3],
        ["int", "x"],
        ["int", None],
        ["float", "1.0"],
        ["float", 1],
        ["bytes", "x"],
        ["bytes", 1],
        ["complex", [1, 2]],
        ["complex", ["list", []]],
        ["complex", [[], []]],
        ["complex", 1],
        ["object", 1],
        ["held", 1],
        [1, 2],
        [["list", []], 1],
        {"list": []},
        ["tuple", [], []],
    ],
    ids=str,
)
def test_what_is_no_value(data):
    with pytest.raises(NotPlain):
        unpacked(data, nothing)
