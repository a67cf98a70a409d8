"""Small programs to write or to repair, in English and Spanish, with their tests; made here."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from potstill.core.types import Case, Example, Split, Tests
from potstill.sources import Skip, Source, Splits, hash_of_made
from potstill.sources._families import FAMILIES, INPUTS, Family, Language, filled
from potstill.sources._mutants import Mutant, failing, mutants
from potstill.sources._program_cases import Cases, Constant, cases_of

Kind = Literal["seen", "validation", "new instance", "new family"]
_USED: dict[int, Kind] = {0: "new instance", 2: "validation", 5: "new instance"}  # of each ten constants of a family

_STATEMENTS: dict[Language, tuple[str, ...]] = {
    "en": (
        "Read {input}. Print {asked}.",
        "Write a program that reads {input} and prints {asked}.",
        "The input is {input}. The output must be {asked}.",
    ),
    "es": (
        "Lee {input}. Imprime {asked}.",
        "Escribe un programa que lea {input} e imprima {asked}.",
        "La entrada es {input}. La salida debe ser {asked}.",
    ),
}
_SHOWN: dict[Language, str] = {
    "en": "Example input:\n{stdin}\nExample output:\n{expected}",
    "es": "Ejemplo de entrada:\n{stdin}\nEjemplo de salida:\n{expected}",
}
_STEP: dict[Language, str] = {"en": "Step", "es": "Paso"}
_PRINT: dict[Language, dict[bool, str]] = {
    "en": {False: "Print r.", True: "Print the items of r."},
    "es": {False: "Imprimir r.", True: "Imprimir los elementos de r."},
}
_REPAIR: dict[Language, str] = {
    "en": "Repair the program.\n\nTask: {task}\n\nProgram:\n```python\n{program}\n```\n\nMessage:\n{message}",
    "es": "Repara el programa.\n\nTarea: {task}\n\nPrograma:\n```python\n{program}\n```\n\nMensaje:\n{message}",
}
_WRONG: dict[Language, str] = {
    "en": "Wrong answer: for the input\n{stdin}\nit prints\n{printed}\nand not\n{expected}",
    "es": "Respuesta incorrecta: con la entrada\n{stdin}\nimprime\n{printed}\ny no\n{expected}",
}
_FOUND: dict[Language, tuple[str, str, str]] = {
    "en": ("The message is: {message}", "The mistake is in line {line}: {wrong}", "It must be: {right}"),
    "es": ("El mensaje es: {message}", "El error está en la línea {line}: {wrong}", "Debe ser: {right}"),
}


class Programs(Source, kind="programs"):
    """Small problems in Python, read from stdin and answered on stdout, of 56 families that each have one constant. No file, no
    network.

    The answer thinks in steps and holds the program: `<think>`, lines of `Step k:` or `Paso k:`, `</think>`, and in `<answer>`
    one fenced block of Python. `tests` holds cases that the statement does not show; their outputs are computed in another way
    than by the reference program, and they tell it from its mutants, from the programs of other constants, and from programs
    that read a part of the input. With `task = "repair"` a row shows a program that one change has broken, with the
    interpreter's own message or the wrong output for an input that is no test; those rows depend on the version of Python.

    Splits are its own. An instance is a family with a constant: a tenth of each family's are validation and a fifth are test,
    in all languages and phrasings and whatever `instances` says, tag "new instance/FAMILY". `new_families` whole families are
    test alone, tag "new family/FAMILY". Key: of a seen family the instance, of a new one the family, because rows of one are
    alike and are drawn together.
    """

    own_splits: ClassVar[bool] = True

    task: Literal["write", "repair"] = Field(default="write", description="write a program, or repair a broken one")
    languages: tuple[Language, ...] = Field(default=("en", "es"), min_length=1, description="languages of the statements")
    families: int = Field(
        default=len(FAMILIES), ge=2, le=len(FAMILIES), description="use only so many families, drawn by the seed"
    )
    new_families: int = Field(default=6, ge=0, description="of these, families that are in the test alone")
    instances: int = Field(default=20, ge=5, description="at most so many constants of a family")
    phrasings: int = Field(default=3, ge=1, le=3, description="phrasings of each training instance; others are asked in one")
    cases: int = Field(
        default=4,
        ge=1,
        le=20,
        description="tests of each row at least; twice as many where only two outputs are drawn, and more where it takes "
        "more to tell wrong programs apart",
    )
    shown: int = Field(default=1, ge=0, le=3, description="inputs and outputs that a statement shows; they are no tests")
    mutants: int = Field(default=2, ge=1, le=20, description='broken programs of each instance, under task = "repair"')
    think: bool = Field(
        default=True, description="whether answers think before they answer; else they are the fenced program alone"
    )
    seed: int = Field(default=0, description="of the draw of families, constants, cases and phrasings")

    @field_validator("languages")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError(f"names a language twice: {', '.join(names)}")
        return names

    @model_validator(mode="after")
    def _own_splits(self) -> "Programs":
        if self.splits != Splits():
            raise ValueError("programs splits by constant and family; leave splits out")
        if self.new_families >= self.families:
            raise ValueError(f"new_families = {self.new_families} must leave one of families = {self.families} to train on")
        return self

    def rows(self, skip: Skip | None = None) -> Iterator[Example]:
        for family, constant, kind in self._instances():
            seed = self._number("cases", family.name, constant)
            cases = cases_of(family, constant, seed, self.cases, self.shown)
            for language in self.languages:
                yield from self._rows(family, constant, kind, language, cases)

    def split_of(self, example: Example) -> Split:
        kind = example.tag.split("/")[0]
        return "train" if kind == "seen" else "validation" if kind == "validation" else "test"

    def content_hash(self) -> str:
        return hash_of_made(self)

    def _rows(self, family: Family, constant: Constant, kind: Kind, language: Language, cases: Cases) -> Iterator[Example]:
        shown, tests = cases.shown, Tests(cases=cases.tests)
        for phrasing in self._phrasings(family, constant, kind, language):
            statement = _statement(family, constant, language, phrasing, shown)
            common = {"family": family, "constant": constant, "kind": kind, "language": language, "tests": tests}
            if self.task == "write":
                program = family.program(constant)
                yield self._row(statement, _solution(family, constant, language) if self.think else (), program, **common)
                continue
            for mutant, message in self._broken(family, constant, language, phrasing, cases):
                asked = _REPAIR[language].format(task=statement, program=mutant.program, message=message)
                thought = _found(mutant, message, family.program(constant), language) if self.think else ()
                yield self._row(asked, thought, family.program(constant), **common)

    def _row(
        self,
        instruction: str,
        thought: Sequence[str],
        program: str,
        *,
        family: Family,
        constant: Constant,
        kind: Kind,
        language: Language,
        tests: Tests,
    ) -> Example:
        fenced = f"```python\n{program}\n```"
        steps = "\n".join(f"{_STEP[language]} {number}: {step}" for number, step in enumerate(thought, 1))
        return Example(
            key=family.name if kind == "new family" else f"{family.name} {constant}",
            instruction=instruction,
            response=f"<think>\n{steps}\n</think>\n<answer>\n{fenced}\n</answer>" if self.think else fenced,
            language=language,
            tag=f"{kind}/{family.name}",
            tests=tests,
        )

    def _instances(self) -> Iterator[tuple[Family, Constant, Kind]]:
        """Each instance with what it is used for, which does not depend on how many are used: by families in their own order,
        constants in theirs."""
        drawn = sorted(FAMILIES, key=lambda family: self._number("family", family.name))[: self.families]
        new = {family.name for family in drawn[: self.new_families]}
        chosen = {family.name for family in drawn}
        for family in FAMILIES:
            if family.name not in chosen:
                continue
            order = sorted(family.constants, key=lambda constant: self._number("constant", family.name, constant))
            places = {constant: at for at, constant in enumerate(order[: self.instances])}
            for constant in family.constants:
                if constant in places:
                    yield family, constant, "new family" if family.name in new else _USED.get(places[constant] % 10, "seen")

    def _phrasings(self, family: Family, constant: Constant, kind: Kind, language: Language) -> Iterator[int]:
        drawn = self._number("phrasing", family.name, constant, language)
        count = self.phrasings if kind == "seen" else 1
        yield from ((drawn + number) % len(_STATEMENTS[language]) for number in range(count))

    def _broken(
        self, family: Family, constant: Constant, language: Language, phrasing: int, cases: Cases
    ) -> Iterator[tuple[Mutant, str]]:
        """Mutants that fail, with what is said of them by a case that is no test."""
        told = (*cases.shown, *cases.others)
        given = tuple((case.stdin.rstrip("\n"), case.expected.rstrip("\n")) for case in told)
        found = _failing_mutants(family.program(constant), given, language)
        order = sorted(found, key=lambda each: self._number("mutant", family.name, constant, phrasing, each[0].program))
        yield from order[: self.mutants]

    def _number(self, *parts: object) -> int:
        text = "/".join(map(str, (self.seed, *parts)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _statement(family: Family, constant: Constant, language: Language, phrasing: int, shown: Sequence[Case]) -> str:
    asked = filled(family.asked[language], constant)
    text = _STATEMENTS[language][phrasing].format(input=INPUTS[family.reads].named[language], asked=asked)
    parts = [_SHOWN[language].format(stdin=case.stdin.rstrip("\n"), expected=case.expected.rstrip("\n")) for case in shown]
    return "\n".join([text.replace(" a el ", " al ").replace(" de el ", " del "), *parts])


def _solution(family: Family, constant: Constant, language: Language) -> tuple[str, ...]:
    first, last = INPUTS[family.reads].step[language], _PRINT[language][family.listed]
    return first, filled(family.step[language], constant), last


def _found(mutant: Mutant, message: str, program: str, language: Language) -> tuple[str, ...]:
    """The thought of a repair: the message, the line, what it must be."""
    wrong, right = (text.split("\n")[mutant.line - 1] for text in (mutant.program, program))
    said = message.split("\n")
    short = said[-1] if said[0].startswith("File") else said[0].partition(":")[0]
    return tuple(text.format(message=short, line=mutant.line, wrong=wrong, right=right) for text in _FOUND[language])


@cache  # the same instance in every phrasing and for every split
def _failing_mutants(program: str, cases: tuple[tuple[str, str], ...], language: Language) -> tuple[tuple[Mutant, str], ...]:
    def wrong(stdin: str, expected: str, printed: str) -> str:
        return _WRONG[language].format(stdin=stdin, expected=expected, printed=printed)

    said = ((mutant, failing(mutant.program, cases, wrong)) for mutant in mutants(program))
    return tuple((mutant, message) for mutant, message in said if message is not None)
