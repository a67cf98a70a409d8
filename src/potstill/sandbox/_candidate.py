"""The program's side of assert tests: loads the program and does what the judge asks, one request at a time.

It runs in the program's own process, so it can promise nothing: a hostile program answers what it likes.
"""

from __future__ import annotations

import builtins
import operator
import os
import sys
import types

from potstill.sandbox._values import LINE_BYTES, NotPlain, message, packed, parsed, unpacked

TYPE_CHECKING = False  # `typing` takes longer to import than most programs to run
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, BinaryIO

    from potstill.sandbox._values import Packed

OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *args, **named: function(*args, **named),
    **{function.__name__: function for function in (getattr, setattr, len, iter, next, str, repr, isinstance)},
    **{name: getattr(operator, name) for name in ("getitem", "setitem", "delitem")},
}


class Held:
    """What is not plain stays here; the judge gets its number."""

    def __init__(self) -> None:
        self._things: list[Any] = []
        self._numbers: dict[int, int] = {}

    def pack(self, thing: Any) -> Packed:
        number = self._numbers.get(id(thing))
        if number is None:
            number = self._numbers[id(thing)] = len(self._things)
            self._things.append(thing)
        return ["held", [number, type(thing).__name__]]

    def unpack(self, tag: str, body: Any) -> Any:
        if tag == "held":
            return self._things[body]
        if tag == "known":  # a function or type of the standard library, by name
            module, name = body
            __import__(module)
            return getattr(sys.modules[module], name)
        raise NotPlain(tag)


def serve(program: str, requests: BinaryIO, answers: BinaryIO) -> None:
    """Load the program as the module `solution`, say how that went, then answer until the judge says goodbye."""
    held = Held()
    module = types.ModuleType("solution")
    sys.modules["solution"] = module  # where dataclasses, pickle and type hints look for it

    def load() -> None:
        exec(compile(program, "<program>", "exec", dont_inherit=True), module.__dict__)

    def say(answer: Packed) -> None:
        try:
            line = message(answer)
        except (NotPlain, RecursionError) as error:
            line = message(["raise", "NotPlain", "NotPlain", [], str(error), None])
        answers.write(line)
        answers.flush()

    say(_outcome(load, held))
    while line := requests.readline(LINE_BYTES + 1):
        operation, args, named = parsed(line)
        if operation == "goodbye":
            return
        if operation == "name":
            say(_named(module, args, held))
            continue
        values = [unpacked(arg, held.unpack) for arg in args]
        keywords = {name: unpacked(arg, held.unpack) for name, arg in named}
        function = OPERATIONS[operation]
        say(_outcome(lambda f=function, a=values, k=keywords: f(*a, **k), held, values, keywords))


def _named(module: types.ModuleType, name: str, held: Held) -> Packed:
    """What the program binds to a name: ["ok", value], ["exception", builtin base], or ["missing"]."""
    if name not in vars(module):
        return ["missing"]
    value = vars(module)[name]
    if isinstance(value, type) and issubclass(value, BaseException):
        return ["exception", _builtin_base(value)]
    return _outcome(lambda: value, held)


def _outcome(act: Callable[[], Any], held: Held, args: Any = (), named: Any = ()) -> Packed:
    """["ok", value, arguments] or ["raise", class, nearest builtin class, its arguments, its text, arguments]."""
    try:
        answer = ["ok", packed(act(), held.pack)]
    except NotPlain as error:
        return ["raise", "NotPlain", "NotPlain", [], str(error), None]
    except BaseException as error:
        answer = ["raise", type(error).__name__, _builtin_base(type(error)), _plain_arguments(error), _text(error)]
    try:
        return [*answer, _after(args, named, held)]
    except NotPlain as error:
        return ["raise", "NotPlain", "NotPlain", [], str(error), None]


def _after(args: Any, named: Any, held: Held) -> Packed:
    """The arguments as the call left them, so that lists and dicts that the program changed come back; None without any."""
    everything = [*args, *dict(named).values()]
    if not any(isinstance(arg, list | tuple | dict | set) for arg in everything):
        return None
    return [packed(arg, held.pack) for arg in everything]


def _builtin_base(kind: type) -> str:
    return next((base.__name__ for base in kind.__mro__ if vars(builtins).get(base.__name__) is base), "Exception")


def _plain_arguments(error: BaseException) -> Packed:
    def refuse(thing: Any) -> Packed:
        raise NotPlain(type(thing).__name__)

    try:
        return [packed(arg, refuse) for arg in error.args]
    except NotPlain:
        return None


def _text(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except Exception:
        return ""


def main(program: str) -> None:
    """Serve over the descriptors 3 and 4, then leave at once: threads that the program began do not hold it up."""
    status = 1
    try:
        with open(3, "rb", closefd=False) as requests, open(4, "wb", closefd=False) as answers:
            serve(program, requests, answers)
        status = 0
    finally:
        os._exit(status)
