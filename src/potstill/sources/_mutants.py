"""Programs broken in one place, and what the interpreter says of them."""

import contextlib
import io
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType

FILE = "program.py"

# (pattern, replacement): each place where a pattern stands is one mutant
_SWAPS: tuple[tuple[str, str], ...] = (
    (r" > ", " < "),
    (r" > ", " >= "),
    (r" < ", " > "),
    (r" == ", " != "),
    (r" != ", " == "),
    (r" % ", " // "),
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r" \* ", " + "),
    (r" // ", " / "),
    (r"\bmax\(", "min("),
    (r"\bmin\(", "max("),
    (r"\bsum\(", "max("),
    (r"\bsorted\(", "list("),
    (r"\bint\(x\)", "x"),
    (r"\bint\(input\(\)\)", "input()"),
    (r"\.split\(\)", ""),
    (r"\bprint\(\*r\)", "print(r)"),
    (r"\bprint\(r\)", "print(res)"),
    (r"\binput\b", "imput"),
    (r"\bsplit\b", "spilt"),
    (r"\bcount\b", "cuont"),
    (r"\brange\b", "rnage"),
    (r"\)$", ""),
    (r"\]$", ""),
    (r" in ", " "),
    (r" if ", " "),
    (r"\b(\d+)\b(?!.*\")", "+1"),
)


@dataclass(frozen=True)
class Mutant:
    """A program with one change.

    Attributes:
        line: number of the line that was changed, from 1.
    """

    program: str
    line: int


def mutants(program: str) -> list[Mutant]:
    """Every program that differs from this one by one swap in one place, in a fixed order, each once."""
    found: dict[str, Mutant] = {}
    lines = program.split("\n")
    for number, line in enumerate(lines):
        for changed in _changed(line):
            whole = "\n".join([*lines[:number], changed, *lines[number + 1 :]])
            if whole != program:
                found.setdefault(whole, Mutant(whole, number + 1))
    return list(found.values())


def _changed(line: str) -> Iterator[str]:
    for pattern, instead in _SWAPS:
        for place in re.finditer(pattern, line):
            new = str(int(place[1]) + 1) if instead == "+1" else instead
            yield line[: place.start()] + new + line[place.end() :]


@dataclass(frozen=True)
class Ran:
    """What one of this package's own programs did.

    Attributes:
        printed: what it printed; None where an error ended it.
        message: the interpreter's last words, "" where it ended of itself.
    """

    printed: str | None
    message: str


def compiled(program: str) -> CodeType | None:
    """A program that is run many times; None where it is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of mutants
            return compile(program, FILE, "exec")
    except SyntaxError:
        return None


def run(program: str | CodeType, stdin: str) -> Ran:
    """Run a program of this package in this process: a few lines without loops that could go on; never text of a model."""
    lines = iter(stdin.split("\n"))
    printed = io.StringIO()

    def read() -> str:
        found = next(lines, None)
        if found is None:
            raise EOFError("EOF when reading a line")
        return found

    try:
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of mutants
            code = compile(program, FILE, "exec") if isinstance(program, str) else program
            exec(code, {"__name__": "__main__", "input": read})
    except Exception as error:
        return Ran(None, _last_words(error))
    return Ran(printed.getvalue(), "")


def _last_words(error: Exception) -> str:
    """The line that an error came from and what it says, as a traceback ends."""
    told = traceback.TracebackException.from_exception(error)
    said = "".join(told.format_exception_only()).rstrip()
    if isinstance(error, SyntaxError):
        return said.strip()
    lines = [frame.lineno for frame in told.stack if frame.filename == FILE]
    return f'File "{FILE}", line {lines[-1]}\n{said}' if lines else said


def same_output(printed: str, expected: str) -> bool:
    """Whether two outputs are equal as the judge compares them: blanks at the ends of lines and a last line break do not
    count."""
    return [line.rstrip() for line in printed.rstrip().split("\n")] == [line.rstrip() for line in expected.rstrip().split("\n")]


def failing(program: str, cases: Sequence[tuple[str, str]], wrong: Callable[[str, str, str], str]) -> str | None:
    """What is said of a program at the first case that it fails; None where it passes all.

    Args:
        cases: input and expected output.
        wrong: input, expected and printed output -> how a wrong answer is told.
    """
    for stdin, expected in cases:
        ran = run(program, stdin)
        if ran.printed is None:
            return ran.message
        if not same_output(ran.printed, expected):
            return wrong(stdin, expected, ran.printed.rstrip())
    return None
