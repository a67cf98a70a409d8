"""Assert tests in two processes: a judge runs the tests, the sandbox runs the program, and plain values cross.

In one interpreter a program could change what `==` or `assert` means, or leave before a test fails. So the tests never enter
the sandbox. The judge is an interpreter of its own, not this process: by what a program returns, a test may loop or fill its
memory.
"""

import ast
import builtins
import json
import marshal
import re
import signal
import subprocess
import symtable
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import BinaryIO

from potstill.core.errors import UserError
from potstill.sandbox._tests import FILE, Said
from potstill.sandbox._watch import LOADED
from potstill.sandbox.backend import Backend, Job
from potstill.sandbox.judge import abstained, clipped, limit_verdict, status_verdict
from potstill.sandbox.verdict import Limits, Verdict

JUDGE_MEMORY_MB = 512
_SPARE_S = 2.0  # for the judge to start, and to notice that the program was ended

_BOOT = """\
import sys, types
for name, text in {modules!a}:
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
module.main({arguments})
"""


@dataclass(frozen=True)
class Asserts:
    """Tests that can be run.

    Attributes:
        code: compiled.
        lines: the source.
        names: what they take from the program.
        modules: modules of the standard library that they use without an import.
    """

    code: CodeType
    lines: list[str]
    names: list[str]
    modules: list[str]


@lru_cache(maxsize=4096)
def prepared(tests: str) -> Asserts:
    """Compile tests, and find what they take from the program.

    A name is the program's where the tests neither bind it nor find it among the built-in functions. A module of the standard
    library that they use (`sys.maxsize`) is the judge's own. Where nothing is left, the one built-in function that they call is
    the program's, as in `assert sum(10, 15) == 6`.

    Raises:
        UserError: when the tests are no Python, or take nothing from a program.
    """
    try:
        tree = ast.parse(tests, FILE)
        code = compile(tree, FILE, "exec", dont_inherit=True)
        free = _free_names(symtable.symtable(tests, FILE, "exec"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        place = f"line {error.lineno}: " if isinstance(error, SyntaxError) and error.lineno else ""
        raise UserError(f"tests: {place}{getattr(error, 'msg', error)}; they must be Python statements") from None
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    dotted = {node.value.id for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    modules = {name for name in free & dotted - called if name in sys.stdlib_module_names}
    names = {name for name in free - modules if not hasattr(builtins, name)} or {
        name for name in free & called if hasattr(builtins, name)
    }
    if not names:
        raise UserError("tests: they take nothing from the program; call what it defines, as `assert f(1) == 2` does")
    if len(names) > 1 and all(hasattr(builtins, name) for name in names):
        raise UserError(f"tests: which of {', '.join(sorted(names))} does the program define? They call built-in names alone")
    return Asserts(code, re.split("\r\n|\r|\n", tests), sorted(names), sorted(modules))


def _free_names(table: symtable.SymbolTable) -> set[str]:
    """What the tests look up outside themselves, in whatever function or comprehension they do so."""
    bound = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    looked_up = {s.get_name() for s in table.get_symbols() if s.is_referenced()}
    tables = list(table.get_children())
    while tables:
        inner = tables.pop()
        looked_up |= {s.get_name() for s in inner.get_symbols() if s.is_global() and s.is_referenced()}
        bound |= {s.get_name() for s in inner.get_symbols() if s.is_declared_global() and s.is_assigned()}
        tables += inner.get_children()
    return looked_up - bound


def assert_verdict(backend: Backend, program: str, tests: str, limits: Limits) -> Verdict:
    """Judge a program by assert tests.

    Args:
        backend: where the program runs.
        program: source; loaded as a module, so that what it keeps for `__main__` does not run.
        tests: statements; see `prepared`.
        limits: of the program, and of its tests on the clock.

    Raises:
        UserError: when the tests cannot be run.
    """
    judge = _Judge(prepared(tests), limits)
    ended = backend.run(Job(program=candidate(program), talk=judge.talk), limits)
    if (verdict := limit_verdict(ended, limits)) is not None:
        return verdict
    said = judge.said
    if said is None:
        return abstained(ended, judge.trouble or "the judge was not asked")
    if said.outcome == "gone":
        ended_badly = status_verdict(ended)
        return ended_badly or Verdict("crash", "the program left before its tests had ended", ended.wall_s)
    if said.outcome not in ("pass", "fail", "crash", "memory", "timeout"):
        return abstained(ended, f"the judge said {said.outcome!r}")
    return Verdict(said.outcome, clipped(said.reason), ended.wall_s)


def candidate(program: str) -> str:
    """A program that loads `program` and serves its values on the descriptors 3 and 4."""
    return _BOOT.format(modules=_sources("_values", "_candidate"), arguments=ascii(program))


@dataclass
class _Judge:
    """The parent's side: starts the judge's process on the program's descriptors, and waits for its one line."""

    asserts: Asserts
    limits: Limits
    said: Said | None = None
    trouble: str = field(default="")

    def talk(self, reader: BinaryIO, writer: BinaryIO) -> None:
        descriptors = reader.fileno(), writer.fileno()
        boot = _BOOT.format(modules=_sources("_values", "_tests"), arguments=f"{descriptors[0]}, {descriptors[1]}")
        wait_s = LOADED * self.limits.time_s + _SPARE_S
        memory = max(JUDGE_MEMORY_MB, self.limits.memory_mb) << 20
        asked = self.asserts
        told = marshal.dumps(
            (asked.code, asked.lines, asked.names, asked.modules, memory, int(self.limits.time_s + _SPARE_S) + 1)
        )
        try:
            process = subprocess.Popen(
                [sys.executable, "-s", "-P", "-S", "-B", "-c", boot],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=descriptors,
                env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
                cwd="/",
            )
        except OSError as error:
            self.trouble = f"the judge did not start: {error}"
            return
        with process:
            self._hear(process, told, wait_s)

    def _hear(self, process: subprocess.Popen[bytes], told: bytes, wait_s: float) -> None:
        late = False
        try:
            line, _ = process.communicate(told, timeout=wait_s)
        except subprocess.TimeoutExpired:
            late = True
            process.kill()
            line, _ = process.communicate()
        try:
            outcome, reason = json.loads(line)
            self.said = Said(outcome, reason)
        except ValueError:
            # an abstention here would be within a program's reach: by what it returns, tests may loop or use up their memory
            if late or process.returncode == -signal.SIGXCPU:
                self.said = Said("timeout", f"tests and program ran longer than {self.limits.time_s:g} s")
            elif process.returncode == -signal.SIGKILL:
                self.trouble = "the judge was killed"
            else:
                self.said = Said("fail", "the tests did not come to an end with what the program returned")


@lru_cache(maxsize=4)
def _sources(*names: str) -> list[tuple[str, str]]:
    """Modules of this package as text, for an interpreter that sees no package."""
    folder = Path(__file__).parent
    return [(f"{__package__}.{name}", (folder / f"{name}.py").read_text(encoding="utf-8")) for name in names]
