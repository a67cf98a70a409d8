"""Programs from files, judged in the sandbox. Standard library only: this command starts fast."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.core.errors import UserError
from potstill.core.spelling import suggest
from potstill.core.types import Case
from potstill.sandbox.backend import Backend
from potstill.sandbox.grader import Grade, Grader, Task
from potstill.sandbox.verdict import Limits

UNSAFE = "WARNING: --unsafe-no-sandbox: programs run with your rights, and can read and delete your files"


@dataclass(frozen=True)
class NamedTask:
    """A task and what its line of output calls it.

    Attributes:
        ident: None where the line gives none.
        task: what is graded; or why a line describes nothing that could be.
    """

    ident: str | int | None
    task: Task | str


def task_of(program: Path, stdin: Path | None, expect: Path | None, tests: Path | None) -> Task:
    """The task that files describe.

    Raises:
        UserError: when a file cannot be read, or the files describe no task.
    """
    if (expect is None) == (tests is None):
        raise UserError("give what FILE must print (--expect F), or assert tests (--tests F): one of the two")
    if tests is not None and stdin is not None:
        raise UserError("--stdin goes with --expect; assert tests call the program's functions")
    source = text_of(program)
    if tests is not None:
        return _told(f"{tests}", lambda: Task(source, asserts=text_of(tests)))
    assert expect is not None
    return Task(source, cases=(Case(text_of(stdin) if stdin is not None else "", text_of(expect)),))


_KEYS = ("id", "program", "stdin", "expected", "tests")  # of a line of jobs; others, unless nearly one of these, are the user's


def tasks_of(path: Path) -> list[NamedTask]:
    """The tasks of a file of JSON lines: `id` and `program`, with `stdin` and `expected`, or with `tests`.

    Raises:
        UserError: no line describes a task; says of the first one why.
    """
    lines = text_of(path).removeprefix("\ufeff").split("\n")
    tasks = [_task_of_line(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    if tasks and all(isinstance(named.task, str) for named in tasks):
        raise UserError(f"{path}: no line is a job; {tasks[0].task}")
    if not tasks:
        raise UserError(f"{path}: no jobs; each line is an object with id, program, stdin and expected, or tests")
    return tasks


def text_of(path: Path) -> str:
    """A file's text, line breaks as they are."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no UTF-8 at byte {error.start}; save the file as UTF-8") from None


def backend_of(name: str | None, unsafe: bool, workers: int | None = None) -> Backend:
    """The backend that the command line asks for.

    Raises:
        UserError: when none is safe here, and the command line does not insist.
    """
    if unsafe and name not in (None, "none"):
        raise UserError(f"--backend {name} is a sandbox and --unsafe-no-sandbox is none; give one of the two")
    if name == "none" and not unsafe:
        raise UserError("--backend none is no sandbox; say --unsafe-no-sandbox if you mean it")
    from potstill.sandbox import trial

    return trial.choose("none" if unsafe else name, workers)


def grade_all(
    tasks: Sequence[NamedTask], backend: Backend, limits: Limits, workers: int | None, say: Callable[[NamedTask, Grade], None]
) -> bool:
    """Grade, and say each grade as soon as all before it are said; whether every program was judged.

    What describes no task is abstained from.
    """
    ready = {i: Grade("abstain", named.task, 0.0, None, ()) for i, named in enumerate(tasks) if isinstance(named.task, str)}
    asked = [i for i in range(len(tasks)) if i not in ready]
    said, judged = 0, not ready

    def done(number: int, grade: Grade) -> None:
        nonlocal said, judged
        ready[asked[number]] = grade
        judged = judged and grade.outcome != "abstain"
        while said in ready:
            say(tasks[said], ready.pop(said))
            said += 1

    with Grader(backend, limits, workers) as grader:
        grader.grade([named.task for named in tasks if isinstance(named.task, Task)], done)
    return judged


def line_of(grade: Grade) -> dict[str, Any]:
    """What `--json` prints of a grade."""
    return {"verdict": grade.outcome, "reason": grade.reason, "wall_s": round(grade.wall_s, 4)}


def _task_of_line(line: str, number: int) -> NamedTask:
    """A line's task, or why it describes none, with the line's number; so it costs the other lines nothing."""
    place = f"line {number}"
    try:
        job = json.loads(line)
    except (ValueError, RecursionError) as error:
        return NamedTask(None, f"{place}: no JSON: {error}")
    try:
        return _task_of(job, place)
    except UserError as error:
        ident = job.get("id") if isinstance(job, dict) else None
        return NamedTask(ident if isinstance(ident, str | int) and not isinstance(ident, bool) else None, str(error))


def _task_of(job: Any, place: str) -> NamedTask:
    if not isinstance(job, dict):
        raise UserError(f"{place}: must be an object with id, program, stdin and expected, or tests")
    for key in job.keys() - set(_KEYS):
        near = suggest(key, [known for known in _KEYS if known not in job], least=0.8)
        if near:  # a right program would be judged without its input
            raise UserError(f"{place}: no key '{key[:60]}'{near}")
    ident, program = _field(job, "id", str | int, place), _field(job, "program", str, place)
    if ("tests" in job) == ("expected" in job):
        raise UserError(f"{place}: needs `expected` (with `stdin`), or `tests`: one of the two")
    if "tests" in job:
        tests = _field(job, "tests", str | list, place)
        if isinstance(tests, list):
            if not all(isinstance(test, str) for test in tests):
                raise UserError(f"{place}: `tests` must be text, or a list of texts")
            tests = "\n".join(tests)
        return NamedTask(ident, _told(place, lambda: Task(program, asserts=tests)))
    stdin = _field(job, "stdin", str, place) if "stdin" in job else ""
    return NamedTask(ident, Task(program, cases=(Case(stdin, _field(job, "expected", str, place)),)))


def _field(job: dict[str, Any], name: str, kind: Any, place: str) -> Any:
    if name not in job:
        raise UserError(f"{place}: no `{name}`")
    value = job[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = {"id": "text or a whole number", "tests": "text, or a list of texts"}.get(name, "text")
        raise UserError(f"{place}: `{name}` must be {wanted}, not {json.dumps(value)[:60]}")
    return value


def _told(place: str, make: Callable[[], Task]) -> Task:
    try:
        return make()
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
