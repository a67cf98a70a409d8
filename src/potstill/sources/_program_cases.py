"""Inputs and outputs of a small problem, chosen so that wrong programs fail."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from random import Random
from types import CodeType

from potstill.core.types import Case
from potstill.sources._families import INPUTS, Family, filled
from potstill.sources._mutants import compiled, mutants, run

POOL = 96  # inputs that are drawn to choose from
TWO = 2  # as many outputs can be guessed
_READ_WRONG = ("{}[:1]", "{}[1:]", "{}[:-1]", "list(dict.fromkeys({}))")  # a list: a part of it, or what repeats once
_LEFT_OUT = ((r" % \d+\b", ""), (r'(\.replace\(".", ".?")\)', r"\1, 1)"))  # a remainder; all places but the first

Constant = int | str
Printed = Callable[[str], str | None]  # of a line of input; None: it ended in an error


@dataclass(frozen=True)
class Cases:
    """The cases of one instance; no input stands twice.

    Attributes:
        shown: those that a statement shows.
        tests: those that judge a program.
        others: neither.
    """

    shown: tuple[Case, ...]
    tests: tuple[Case, ...]
    others: tuple[Case, ...]


@cache  # the same in every language and for every split
def cases_of(family: Family, constant: Constant, seed: int, least: int, shown: int) -> Cases:
    """Cases of which the tests fail each of `wrong_programs` that can be told from the reference by any that was drawn.

    Args:
        least: tests at least; twice as many where only two different outputs were drawn.
    """
    random = Random(seed)
    drawn = dict.fromkeys(family.draw(random, constant) for _ in range(POOL))
    mixed = _by_turns({line: family.expected(line, constant) for line in drawn})
    examples, pool = mixed[:shown], dict(mixed[shown:])
    wanted = least * (2 if len(set(pool.values())) <= TWO else 1)
    tests = dict(list(pool.items())[:TWO])
    for printed in wrong_programs(family, constant):
        if all(printed(line) == expected for line, expected in tests.items()):
            told = next((line for line, expected in pool.items() if printed(line) != expected), None)
            if told is not None:
                tests[told] = pool[told]
    for line, expected in pool.items():
        if len(tests) >= wanted:
            break
        tests.setdefault(line, expected)
    others = [pair for pair in pool.items() if pair[0] not in tests]
    return Cases(*(tuple(Case(f"{line}\n", f"{text}\n") for line, text in part) for part in (examples, tests.items(), others)))


def _by_turns(outputs: dict[str, str]) -> list[tuple[str, str]]:
    """Inputs with their outputs, each different output once, then each a second time, and so on."""
    of: dict[str, list[tuple[str, str]]] = {}
    for pair in outputs.items():
        of.setdefault(pair[1], []).append(pair)
    return [pair for turn in zip_longest(*of.values()) for pair in turn if pair is not None]


def wrong_programs(family: Family, constant: Constant) -> Iterator[Printed]:
    """What else might be written: mutants, other constants in all places or in one, and programs that read wrongly."""
    program = family.program(constant)
    for other in family.constants:
        if other != constant:
            yield lambda line, other=other: family.expected(line, other)
    places = len(re.findall(r"\{a\}", family.expression))
    first, second, last = program.split("\n")
    texts = dict.fromkeys(mutant.program for mutant in mutants(program))
    if places > 1:
        for other in family.constants:
            texts |= dict.fromkeys("\n".join([first, f"r = {text}", last]) for text in _one_place(family, constant, other))
    texts |= dict.fromkeys("\n".join([first, re.sub(pattern, instead, second), last]) for pattern, instead in _LEFT_OUT)
    if family.reads in ("ints", "words"):
        name = INPUTS[family.reads].line.partition(" ")[0]
        texts |= dict.fromkeys("\n".join([first, f"{name} = {read.format(name)}", second, last]) for read in _READ_WRONG)
    texts.pop(program, None)
    for code in filter(None, map(compiled, texts)):
        yield lambda line, code=code: _printed(code, line)


def _printed(code: CodeType, line: str) -> str | None:
    printed = run(code, line).printed
    return None if printed is None else printed.removesuffix("\n")


def _one_place(family: Family, constant: Constant, other: Constant) -> Iterator[str]:
    parts = family.expression.split("{a}")
    for at in range(len(parts) - 1):
        yield filled("{a}".join(parts[: at + 1]) + str(other) + "{a}".join(parts[at + 1 :]), constant)
