"""The judge's side of assert tests: runs trusted tests in a process of its own, and asks an untrusted program for values.

The program's functions, classes and objects are `Remote`s here. What comes back from them is rebuilt from plain values, so
that every `==`, `<` and `in` of a test is Python's own. A pass is written by this process alone, after the last statement.
"""

from __future__ import annotations

import builtins
import json
import marshal
import os
import reprlib
import resource
import sys
from types import CodeType, FunctionType, TracebackType

from potstill.sandbox._values import LINE_BYTES, NotPlain, message, packed, parsed, unpacked

TYPE_CHECKING = False  # `typing` takes longer to import than most programs to run
if TYPE_CHECKING:
    from typing import Any, BinaryIO

    from potstill.sandbox._values import Packed

FILE = "<tests>"  # as compiled
_NO_TEST_NEEDS = ("eval", "exec", "compile", "input", "breakpoint", "exit", "quit", "help")
_EVENTS = ("subprocess.", "socket.", "os.exec", "os.fork", "os.posix_spawn", "os.system", "os.kill", "os.remove", "os.rename")
_EVENTS += ("os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate", "ctypes.", "pickle.")
# raised out of a call they would end a loop or a generator of the test in silence
_NEVER_RAISED = (StopIteration, StopAsyncIteration, GeneratorExit, KeyboardInterrupt)


class Gone(BaseException):
    """The program ended, or was ended, before it answered."""


class Misbehaved(BaseException):
    """The program answered with what is no plain value, or broke the protocol."""


class Raised(Exception):
    """An exception of the program that has no built-in class near it."""


class Said:
    """What the tests came to.

    Attributes:
        outcome: `gone` where the program ended first: how it ended then decides.
        reason: one line; may quote the program.
    """

    __slots__ = ("outcome", "reason")

    def __init__(self, outcome: str, reason: str) -> None:
        self.outcome, self.reason = outcome, reason


class Link:
    """Requests to the program and its answers."""

    def __init__(self, answers: BinaryIO, requests: BinaryIO) -> None:
        self._answers, self._requests = answers, requests
        self._remotes: dict[int, Remote] = {}
        self._exceptions: dict[str, Any] = {}
        self.broken: BaseException | None = None  # kept: a test's bare `except:` must not swallow it
        self.asked = False
        self.last: Any = None
        self.over = False

    def loaded(self) -> None:
        """Wait until the program has run once; raises what it raised."""
        self._value(self._answer(), stop=False)

    def named(self, name: str) -> tuple[bool, Any]:
        """Whether the program binds `name`, and to what."""
        self._send(["name", name, []])
        answer = self._answer()
        match answer:
            case ["missing"]:
                return False, None
            case ["exception", str(base)]:
                self._exceptions[name] = type(name, (_builtin_exception(base) or Exception,), {})
                return True, self._exceptions[name]
        value = self._value(answer, stop=False)
        self.asked |= type(value) is not Remote  # a constant is used by its value
        return True, value

    def ask(self, operation: str, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Have the program do one thing; lists, dicts and sets among the arguments become what the program made of them."""
        packed_named = [[name, packed(arg, self._pack)] for name, arg in named.items()]
        self._send([operation, [packed(arg, self._pack) for arg in args], packed_named])
        answer = self._answer()
        self.asked |= operation == "call"
        self._bring_back(answer[-1], args, named)
        value = self._value(answer, stop=operation == "next")
        if operation == "call":
            self.last = value
        return value

    def close(self) -> None:
        """Let the program go."""
        self.over = True
        try:
            self._requests.write(message(["goodbye", [], []]))
            self._requests.flush()
        except (OSError, ValueError):
            pass  # the program is gone already

    def _send(self, request: Packed) -> None:
        if self.broken is not None:
            raise self.broken
        line = message(request)
        try:
            self._requests.write(line)
            self._requests.flush()
        except (OSError, ValueError):
            raise self.broke(Gone("the program ended before the tests did")) from None

    def _answer(self) -> Packed:
        try:
            line = self._answers.readline(LINE_BYTES + 1)
        except OSError:
            line = b""
        if not line:
            raise self.broke(Gone("the program ended before the tests did"))
        try:
            answer = parsed(line)
        except NotPlain as error:
            raise self.broke(Misbehaved(str(error))) from None
        if type(answer) is not list or not answer:
            raise self.broke(Misbehaved("an answer of no known form"))
        return answer

    def _value(self, answer: Packed, stop: bool) -> Any:
        match answer:
            case ["ok", value, _]:
                return self._unpack(value)
            case ["raise", _, "NotPlain", _, str(text), _]:
                raise self.broke(Misbehaved(text))
            case ["raise", str(name), str(base), args, str(text), _]:
                raise self._error(name, base, args, text, stop)
        raise self.broke(Misbehaved("an answer of no known form"))

    def _error(self, name: str, base: str, args: Packed, text: str, stop: bool) -> BaseException:
        if stop and base == "StopIteration":
            return StopIteration()
        kind = self._exceptions.get(name) or _builtin_exception(base) or Raised
        plain = [text] if type(args) is not list else [self._unpack(arg) for arg in args]
        try:
            error = kind(*plain)
        except TypeError:  # such as UnicodeDecodeError, whose arguments have fixed types
            error = Raised(text)
        error._of_program = f"{name}: {text}" if text else name  # pyright: ignore[reportAttributeAccessIssue]
        return error

    def _bring_back(self, after: Packed, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if type(after) is not list:
            return
        olds = [*args, *named.values()]
        if len(after) != len(olds):
            raise self.broke(Misbehaved("an answer of no known form"))
        for old, new in zip(olds, after, strict=True):
            brought_back(old, self._unpack(new))

    def _unpack(self, data: Packed) -> Any:
        try:
            return unpacked(data, self._remote)
        except NotPlain as error:
            raise self.broke(Misbehaved(str(error))) from None

    def _remote(self, tag: str, body: Packed) -> Remote:
        match body:
            case [int(number), str(kind)] if tag == "held":
                return self._remotes.setdefault(number, Remote(self, number, kind))
        raise NotPlain(f"a value of the kind {tag[:40]!r}")

    def _pack(self, thing: Any) -> Packed:
        if type(thing) is Remote:
            return ["held", thing._potstill_number]
        module, name = str(getattr(thing, "__module__", "")), str(getattr(thing, "__name__", ""))
        if module.partition(".")[0] in sys.stdlib_module_names and getattr(sys.modules.get(module), name, None) is thing:
            return ["known", [module, name]]
        raise NotPlain(f"the tests pass a {type(thing).__name__} of their own, which cannot cross into the program")

    def broke(self, error: BaseException) -> BaseException:
        """Nothing that the program answers counts after this; give the error back."""
        self.broken = error
        return error


class Remote:
    """A function, a class or an object that lives in the program: every use of it is a request.

    It equals itself alone, and has no truth value, order or arithmetic: else a program's object could say of itself that it is
    near, above or among what a test expects. Its attributes, items and text are values of the program like any other.
    """

    __slots__ = ("_potstill_kind", "_potstill_link", "_potstill_number")

    def __init__(self, link: Link, number: int, kind: str) -> None:
        for name, value in (("link", link), ("number", number), ("kind", kind)):
            object.__setattr__(self, f"_potstill_{name}", value)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __bool__(self) -> bool:
        raise self._potstill_link.broke(Misbehaved(f"{self._potstill_told()} where a plain value must be"))

    def __call__(self, *args: Any, **named: Any) -> Any:
        return _ask(self, "call", *args, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__dict__"):
            raise AttributeError(name)
        return _ask(self, "getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "setattr", name, value)

    def __len__(self) -> int:
        return _ask(self, "len")

    def __getitem__(self, key: Any) -> Any:
        return _ask(self, "getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _ask(self, "setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        _ask(self, "delitem", key)

    def __iter__(self) -> Remote:
        iterator = _ask(self, "iter")
        if type(iterator) is not Remote:
            raise TypeError("an object that cannot be iterated over")
        return iterator

    def __next__(self) -> Any:
        return _ask(self, "next")

    def __instancecheck__(self, thing: object) -> bool:
        return type(thing) is Remote and _ask(thing, "isinstance", self) is True

    def __str__(self) -> str:
        return self._potstill_told() if self._potstill_link.over else _ask(self, "str")

    def __repr__(self) -> str:
        return self._potstill_told() if self._potstill_link.over else _ask(self, "repr")

    def _potstill_told(self) -> str:
        return f"an object of the program's {self._potstill_kind[:40]}"


def _ask(remote: Remote, operation: str, *args: Any, **named: Any) -> Any:
    return remote._potstill_link.ask(operation, (remote, *args), named)


def brought_back(old: Any, new: Any) -> Any:
    """`new`, put into the list, dict or set that `old` is, so that every name of the test for it sees the change."""
    if type(old) is not type(new):
        return new
    if type(old) is list:
        old[:] = [*map(brought_back, old, new), *new[len(old) :]]
        return old
    if type(old) is tuple:
        return (*map(brought_back, old, new), *new[len(old) :])
    if type(old) is dict:
        merged = {key: brought_back(old[key], value) if key in old else value for key, value in new.items()}
        old.clear()
        old.update(merged)
        return old
    if type(old) is set:
        old.clear()
        old.update(new)
        return old
    return new


def _builtin_exception(name: str) -> type[Exception] | None:
    kind = vars(builtins).get(name)
    if not (isinstance(kind, type) and issubclass(kind, Exception | SystemExit)) or issubclass(kind, _NEVER_RAISED):
        return None
    return kind  # pyright: ignore[reportReturnType]


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # a whole number of too many digits
        return f"a value of type {type(value).__name__}"


def judged(code: CodeType, lines: list[str], names: list[str], modules: list[str], link: Link) -> Said:
    """Run the tests against the program.

    Args:
        code: the tests, compiled.
        lines: their source.
        names: what they take from the program.
        modules: modules of the standard library that they use without importing them.
        link: to the program.
    """
    allowed = {name: value for name, value in vars(builtins).items() if name not in _NO_TEST_NEEDS}
    space: dict[str, Any] = {"__builtins__": allowed, "__name__": "__main__"}
    missing: list[str] = []
    try:
        link.loaded()
        for name in names:
            there, value = link.named(name)
            if there:
                space[name] = value
            else:
                missing.append(name)
        space.update({name: __import__(name) for name in modules})
        exec(code, space)
        for test in _test_functions(space):
            test()
    except BaseException as error:
        link.over = True  # what explains the failure asks the program nothing more
        return _why(link.broken or error, lines, missing, link.last)
    if link.broken is not None:
        return _why(link.broken, lines, missing, link.last)
    if not link.asked:
        return Said("fail", "the tests called nothing that the program defines")
    return Said("pass", "")


def _test_functions(space: dict[str, Any]) -> list[Any]:
    """Functions `test_…` without parameters, which the tests define for a runner such as pytest to call."""
    functions = [value for name, value in space.items() if name.startswith("test_") and type(value) is FunctionType]
    return [function for function in functions if not function.__code__.co_argcount and not function.__code__.co_kwonlyargcount]


def _why(error: BaseException, lines: list[str], missing: list[str], last: Any) -> Said:
    of_program = getattr(error, "_of_program", None)
    place = _place(error.__traceback__, lines)
    match error:
        case Gone():
            return Said("gone", str(error))
        case Misbehaved() | NotPlain():
            return Said("fail", f"{place}{error}")
        case MemoryError() if of_program is not None:
            return Said("memory", of_program)
        case _ if of_program is not None:
            return Said("crash", f"{place}{of_program}")
        case AssertionError():
            text = f" ({error})" if str(error) else ""
            return Said("fail", f"{place}does not hold{text}; the last call gave {_shown(last)}")
        case NameError() if error.name in missing:
            return Said("fail", f"the program defines no {error.name!r}")
    return Said("fail", f"{place}{type(error).__name__}: {error}")


def _place(trace: TracebackType | None, lines: list[str]) -> str:
    line = 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == FILE:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"line {line}: {lines[line - 1].strip()[:200]}: " if 0 < line <= len(lines) else ""


def _limit(memory_bytes: int, processor_s: int) -> None:
    """A test may loop or grow by what a program returned; the soft limit on time kills by a signal of its own."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (processor_s, processor_s + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _watch(event: str, args: tuple[Any, ...]) -> None:
    """Tests compute: they start nothing, delete nothing and write no file, also where a data set's test would."""
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event.startswith(_EVENTS):
        raise PermissionError(f"a test may not do this: {event}")


def main(read_from: int, write_to: int) -> None:
    """Judge what standard input holds; the verdict is the one line of standard output."""
    code, lines, names, modules, memory_bytes, processor_s = marshal.loads(sys.stdin.buffer.read())
    verdict = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # a test's own prints are no verdict
    _limit(memory_bytes, processor_s)
    with open(read_from, "rb") as answers, open(write_to, "wb") as requests:
        sys.addaudithook(_watch)
        link = Link(answers, requests)
        said = judged(code, lines, names, modules, link)
        verdict.write(json.dumps([said.outcome, said.reason[:2000]]) + "\n")
        verdict.flush()
        link.close()
    os._exit(0)
