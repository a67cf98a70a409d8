"""Programs of answers, run and judged by their rows' tests: one grader for the whole process, opened at its first use."""

import atexit
import hashlib
import platform
from collections import OrderedDict
from collections.abc import Callable, Sequence

from pydantic import Field

from potstill.core.component import Settings
from potstill.core.errors import UserError
from potstill.core.types import Abstain, Example, Tests
from potstill.sandbox.grader import Grade, Grader, Task
from potstill.sandbox.verdict import MEMORY_MB, TIME_S, Limits, Verdict
from potstill.scorers.code import program_of, statements

_REMEMBERED = 20_000  # grades: two rewards of one step ask for the same ones


class Judging(Settings):
    """What one run of a program may use, beside the sandbox's own limits."""

    time_s: float = Field(default=4.0, ge=TIME_S[0], le=TIME_S[1], description="seconds on the clock for one test")
    memory_mb: int = Field(default=512, ge=MEMORY_MB[0], le=MEMORY_MB[1], description="address space of a program, MiB")

    def limits(self) -> Limits:
        """The same as the sandbox takes them."""
        return Limits(time_s=self.time_s, memory_mb=self.memory_mb)


class _Desk:
    """The process's grader, and the grades that it has given."""

    def __init__(self) -> None:
        self.open: Callable[[], Grader] = _default
        self.grader: Grader | None = None
        self.known: OrderedDict[bytes, Grade] = OrderedDict()

    def at_work(self) -> Grader:
        if self.grader is None:
            self.grader = self.open()
        return self.grader

    def close(self) -> None:
        grader, self.grader = self.grader, None
        self.known.clear()
        if grader is not None:
            grader.close()


def _default() -> Grader:
    from potstill.sandbox.trial import choose

    return Grader(choose(None))


_DESK = _Desk()
atexit.register(_DESK.close)


def use(opened: Callable[[], Grader] | None) -> None:
    """Say what opens the process's grader, before its first use or instead of the one in use; None: the default.

    The command line does so for `--unsafe-no-sandbox`; what was judged before is forgotten.
    """
    _DESK.close()
    _DESK.open = opened or _default


def sandbox() -> str:
    """The name of the backend that judges.

    Raises:
        UserError: no backend is safe here.
    """
    return _DESK.at_work().backend.name


def judged_by() -> dict[str, str]:
    """The backend that judges, its version (of one that Linux itself makes, the kernel's), and the Python of the programs.

    Raises:
        UserError: no backend is safe here.
    """
    backend = _DESK.at_work().backend
    version = getattr(backend, "version", "") or f"{platform.system()} {platform.release()}"
    return {"backend": backend.name, "version": version, "python": platform.python_version()}


def close() -> None:
    """End the grader's workers and processes; the next use opens it again."""
    _DESK.close()


def grades(programs: Sequence[tuple[str, Tests]], limits: Limits | None = None) -> list[Grade]:
    """The grade of each program by its tests; equal programs with equal tests are run once, but for abstentions.

    An empty program fails without being run.

    Raises:
        UserError: no backend is safe here; or tests that cannot be run.
    """
    limits = limits or Limits()
    keys = [_key(program, tests, limits) for program, tests in programs]
    tasks: dict[bytes, Task] = {}
    found: dict[bytes, Grade] = {}
    for key, (program, tests) in zip(keys, programs, strict=True):
        if not program.strip():
            found[key] = _NO_PROGRAM
        elif key in _DESK.known:
            found[key] = _DESK.known[key]
        elif key not in tasks:
            tasks[key] = Task.of(_whole(program, tests), tests, limits)
    if tasks:
        found |= zip(tasks, _DESK.at_work().grade(list(tasks.values())), strict=True)
    for key in tasks:
        if found[key].outcome != "abstain":
            _DESK.known[key] = found[key]
    while len(_DESK.known) > _REMEMBERED:
        _DESK.known.popitem(last=False)
    return [found[key] for key in keys]


_FAILED = Verdict("fail", "the answer holds no program", 0.0)
_NO_PROGRAM = Grade(_FAILED.outcome, _FAILED.reason, 0.0, 0.0, (_FAILED,))
NO_TESTS = "the row has no tests"


def grades_of(answers: Sequence[str], examples: Sequence[Example], limits: Limits | None = None) -> list[Grade | Abstain]:
    """The grade of the program in each answer (`code.program_of`) by its row's tests; an abstention where there are none, or
    where the sandbox itself failed."""
    asked = [
        (number, (program_of(answer), example.tests))
        for number, (answer, example) in enumerate(zip(answers, examples, strict=True))
        if example.tests is not None
    ]
    found: list[Grade | Abstain] = [Abstain(NO_TESTS)] * len(answers)
    for (number, _), grade in zip(asked, grades([program for _, program in asked], limits), strict=True):
        found[number] = Abstain(grade.reason) if grade.outcome == "abstain" else grade
    return found


def outcomes_of(answers: Sequence[str], examples: Sequence[Example], found: Sequence[Grade | Abstain]) -> list[str]:
    """How the program of each answer ended: the sandbox's outcome; `no_parse` or `no_program` where it could not begin."""
    return [_outcome(*each) for each in zip(answers, examples, found, strict=True)]


def _outcome(answer: str, example: Example, grade: Grade | Abstain) -> str:
    if isinstance(grade, Abstain) or example.tests is None:
        return "abstain"
    program = program_of(answer)
    if grade.outcome == "pass":
        return "pass"
    if not statements(program) and statements(program) is not None:
        return "no_program"
    return grade.outcome if statements(_whole(program, example.tests)) is not None else "no_parse"


def unfit(tests: Tests) -> str:
    """Why tests cannot judge any program: there are none, or their asserts are no Python; "" where they can."""
    try:
        Task.of("pass", tests)
    except UserError as error:
        return str(error)
    return ""


def failing_references(examples: Sequence[Example], limits: Limits | None = None) -> dict[int, str]:
    """The rows whose own reference solution does not pass their tests: place in `examples` -> why; rows without tests or
    without a reference are passed over.

    A data set's tests are trusted, not always right: such a row would count every correct program as wrong.

    Raises:
        UserError: the sandbox could not judge a reference.
    """
    places = [place for place, example in enumerate(examples) if example.tests is not None and example.response.strip()]
    found = grades_of([examples[place].response for place in places], [examples[place] for place in places], limits)
    failing: dict[int, str] = {}
    for place, grade in zip(places, found, strict=True):
        if isinstance(grade, Abstain):
            raise UserError(f"the reference of row {examples[place].key!r} could not be judged: {grade.reason}")
        if grade.outcome != "pass":
            failing[place] = f"{grade.outcome}: {grade.reason}"
    return failing


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Chance that one of k answers passes, of which `passed` of `samples` did: 1 − C(n−c, k) / C(n, k).

    Unbiased; Chen et al., arXiv:2107.03374, eq. 1.

    Raises:
        ValueError: fewer samples than k, or more passes than samples.
    """
    if not 1 <= k <= samples or not 0 <= passed <= samples:
        raise ValueError(f"pass@{k} of {samples} samples with {passed} passes")
    missed = 1.0
    for i in range(k):  # C(n−c, k) / C(n, k), factor by factor: no number grows
        missed *= max(0, samples - passed - i) / (samples - i)
    return 1.0 - missed


def _whole(program: str, tests: Tests) -> str:
    return f"{tests.before}\n{program}" if tests.before else program


def _key(program: str, tests: Tests, limits: Limits) -> bytes:
    hashed = hashlib.blake2b(digest_size=16)
    parts = (program, repr(tests), repr(limits))
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        hashed.update(len(data).to_bytes(8, "big") + data)
    return hashed.digest()
