"""The problems made here: their programs pass, their tests tell programs apart, and nothing held out was seen."""

import re
import subprocess
import sys
from collections import Counter, defaultdict
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError

from potstill.core.types import Example
from potstill.scorers.code import program_of
from potstill.scorers.steps import steps
from potstill.scorers.thoughts import strict
from potstill.sources._families import FAMILIES
from potstill.sources._mutants import mutants, run, same_output
from potstill.sources.programs import Programs


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return list(Programs().rows())


@pytest.fixture(scope="module")
def repairs() -> list[Example]:
    return list(Programs(task="repair", families=20, instances=5).rows())


def passes(program: str, row: Example) -> list[bool]:
    assert row.tests is not None
    ran = [run(program, case.stdin.rstrip("\n")) for case in row.tests.cases]
    return [
        each.printed is not None and same_output(each.printed, case.expected)
        for each, case in zip(ran, row.tests.cases, strict=True)
    ]


def kind(row: Example) -> str:
    return row.tag.split("/")[0]


def test_sizes(rows: list[Example]) -> None:
    assert len(FAMILIES) >= 40
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    counts = Counter(map(Programs().split_of, rows))
    assert counts["train"] >= 2000
    assert 200 <= counts["test"] <= 600
    assert counts["validation"] >= 100
    assert {row.language for row in rows} == {"en", "es"}


def test_every_reference_passes_its_own_tests(rows: list[Example]) -> None:
    """Outputs are computed by `Family.solve`, not by the program."""
    assert [row.key for row in rows if not all(passes(program_of(row.response), row))] == []


def test_no_program_of_one_constant_passes(rows: list[Example]) -> None:
    for row in rows:
        assert row.tests is not None
        assert len(row.tests.cases) >= 4
        assert len({case.expected for case in row.tests.cases}) > 1, row.key


def test_another_constant_of_the_family_fails(rows: list[Example]) -> None:
    """The constant matters: no program passes the tests of another instance."""
    of_family = defaultdict(dict)
    for row in rows:
        of_family[row.tag.split("/")[1]].setdefault(program_of(row.response), row)
    confused: list[tuple[str, str]] = []
    total = 0
    for programs in of_family.values():
        for program in list(programs)[:4]:
            for other, row in list(programs.items())[:6]:
                if program != other:
                    total += 1
                    confused += [(program, other)] if all(passes(program, row)) else []
    assert total > 800
    # there is no prime between 4 and 5
    assert {re.findall(r"range\(([45]), n", program)[0] for pair in confused for program in pair} <= {"4", "5"}


# programs that one might write instead, and the constants for which they are right
TEMPTING: dict[str, tuple[tuple[str, tuple[int | str, ...]], ...]] = {
    "all over": (
        ("'yes' if all(x >= {a} for x in xs) else 'no'", ()),
        ("'yes' if xs[0] > {a} else 'no'", ()),
        ("'yes' if max(xs) > {a} else 'no'", ()),
        ("'yes' if sum(xs) > {a} * len(xs) else 'no'", ()),
    ),
    "is a multiple": (("'yes' if n % ({a} // 2 or 1) == 0 else 'no'", ()), ("'yes' if n % 2 == 0 else 'no'", (2,))),
    "common divisor": (("max(d for d in range(1, 13) if n % d == 0 and {a} % d == 0)", (6, 8, 10, 12)),),
    "clock later": (("'%02d:%02d' % divmod(h * 60 + m + {a}, 60)", ()),),
    "drop letter": (("s.replace('{a}', '', 1)", ()),),
    "sum of largest": (("sum(xs[-{a}:])", ()),),
    "count words with": (("sum(w.count('{a}') for w in ws)", ()),),
    "words sorted after": (("[w for w in ws if w[0] >= '{a}']", ()), ("sorted(w for w in ws if w[0] > '{a}')", ())),
    "count over": (("sum(x >= {a} for x in xs)", ()), ("len({x for x in xs if x > {a}})", ())),
}


def test_wrong_programs_fail(rows: list[Example]) -> None:
    wrong = []
    for row in rows:
        name, program = row.tag.split("/")[1], program_of(row.response)
        family = next(family for family in FAMILIES if family.name == name)
        (constant,) = (one for one in family.constants if family.program(one) == program)
        for text, right in TEMPTING.get(name, ()):
            first, _, last = program.split("\n")
            if constant not in right and all(passes(f"{first}\nr = {text.replace('{a}', str(constant))}\n{last}", row)):
                wrong.append((name, constant, text))
    assert wrong == []


def test_mutants_that_can_be_told_apart_fail() -> None:
    """By inputs that were not drawn for the row."""
    random = Random(99)
    for row in list(Programs(languages=("en",), phrasings=1).rows())[::17]:
        program = program_of(row.response)
        family = next(family for family in FAMILIES if family.name == row.tag.split("/")[1])
        (constant,) = (one for one in family.constants if family.program(one) == program)
        lines = [family.draw(random, constant) for _ in range(50)]
        for mutant in mutants(program):
            if all(passes(mutant.program, row)):
                assert [run(mutant.program, line).printed for line in lines] == [run(program, line).printed for line in lines]


def test_splits_do_not_depend_on_how_many_instances_are_used() -> None:
    def used(instances: int) -> dict[str, str]:
        return {program_of(row.response): kind(row) for row in Programs(families=12, instances=instances).rows()}

    few, many = used(6), used(20)
    assert few.items() <= many.items()
    assert set(few.values()) == {"seen", "validation", "new instance", "new family"}


def test_statements_do_not_show_their_tests(rows: list[Example]) -> None:
    for row in rows:
        assert row.tests is not None
        shown = row.instruction.split("\n")[2]
        assert shown not in [case.stdin.rstrip("\n") for case in row.tests.cases]


def test_the_shown_example_is_right(rows: list[Example]) -> None:
    for row in rows:
        _, _, stdin, _, expected = [*row.instruction.split("\n"), ""][:5]
        ran = run(program_of(row.response), stdin)
        assert ran.printed is not None
        assert same_output(ran.printed, expected), row.instruction


def test_answers_have_the_format_and_three_steps(rows: list[Example]) -> None:
    for row in rows:
        parts = strict(row.response)
        assert parts is not None
        assert steps(parts.thought) == 3
        assert ("Paso 1:" if row.language == "es" else "Step 1:") in parts.thought
        assert "{" not in parts.thought + row.instruction


def test_nothing_held_out_was_seen(rows: list[Example]) -> None:
    source = Programs()
    trained = [row for row in rows if source.split_of(row) == "train"]
    held = [row for row in rows if source.split_of(row) != "train"]
    assert not {row.instruction for row in trained} & {row.instruction for row in held}
    assert not {program_of(row.response) for row in trained} & {program_of(row.response) for row in held}
    families = {row.tag.split("/")[1] for row in trained}
    assert len({row.tag.split("/")[1] for row in held if kind(row) == "new family"}) == 6
    for row in held:
        assert (row.tag.split("/")[1] in families) == (kind(row) in ("validation", "new instance"))


def test_instances_lie_in_one_split_in_all_languages_and_phrasings(rows: list[Example]) -> None:
    splits = defaultdict(set)
    for row in rows:
        splits[program_of(row.response)].add(Programs().split_of(row))
    assert all(len(each) == 1 for each in splits.values())


def test_no_statement_stands_twice(rows: list[Example]) -> None:
    assert len({row.instruction for row in rows}) == len(rows)


def test_rows_follow_from_the_seed() -> None:
    few: dict[str, Any] = {"families": 6, "new_families": 2, "instances": 5}
    assert list(Programs(**few).rows()) == list(Programs(**few).rows())
    assert list(Programs(**few, seed=1).rows()) != list(Programs(**few).rows())
    assert Programs(**few, seed=1).content_hash() != Programs(**few).content_hash()


def test_broken_programs_fail_and_are_repaired(repairs: list[Example]) -> None:
    assert len(repairs) > 300
    for row in repairs:
        broken = re.findall(r"```python\n(.*?)\n```", row.instruction, re.S)[0]
        assert broken != program_of(row.response)
        assert not all(passes(broken, row))
        assert all(passes(program_of(row.response), row))


def test_messages_show_no_test(repairs: list[Example]) -> None:
    shown = 0
    for row in repairs:
        assert row.tests is not None
        message = re.split(r"\n(?:Message|Mensaje):\n", row.instruction)[1].split("\n")
        if len(message) == 6:  # a wrong answer, one line each of input, print and expected output
            shown += 1
            assert message[1] not in [case.stdin.rstrip("\n") for case in row.tests.cases]
    assert shown > 20


def test_messages_are_the_interpreters_own(repairs: list[Example]) -> None:
    seen = Counter[str]()
    for row in repairs:
        broken = re.findall(r"```python\n(.*?)\n```", row.instruction, re.S)[0]
        message = re.split(r"\n(?:Message|Mensaje):\n", row.instruction)[1]
        name = re.search(r"^(\w+Error): ", message, re.M)
        seen[name[1] if name else "wrong"] += 1
        if name and name[1] == "SyntaxError":
            with pytest.raises(SyntaxError) as caught:
                compile(broken, "program.py", "exec")
            assert caught.value.msg in message
            assert f'File "program.py", line {caught.value.lineno}\n' in message
        else:
            compile(broken, "program.py", "exec")
    assert {"SyntaxError", "NameError", "wrong"} <= set(seen)
    assert len(seen) >= 5


def test_a_message_of_a_running_program_is_that_of_a_fresh_interpreter() -> None:
    program = "n = int(input())\nr = n + len(m)\nprint(r)"
    fresh = subprocess.run([sys.executable, "-I", "-c", program], input="3", capture_output=True, text=True)
    assert run(program, "3").message == 'File "program.py", line 2\n' + fresh.stderr.strip().split("\n")[-1]


def test_a_mutant_differs_in_one_line() -> None:
    program = FAMILIES[0].program(3)
    found = mutants(program)
    assert len(found) > 8
    for mutant in found:
        pairs = zip(program.split("\n"), mutant.program.split("\n"), strict=True)
        assert [i for i, (a, b) in enumerate(pairs, 1) if a != b] == [mutant.line]


def test_programs_can_be_asked_without_thoughts() -> None:
    row = next(iter(Programs(think=False, families=3, new_families=1).rows()))
    assert row.response == f"```python\n{program_of(row.response)}\n```"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"families": 6, "new_families": 6}, "new_families = 6 must leave one of families = 6 to train on"),
        ({"splits": {"test": 0.5}}, "programs splits by constant and family; leave splits out"),
        ({"languages": ("en", "en")}, "names a language twice: en, en"),
    ],
)
def test_fields_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Programs(**fields)
