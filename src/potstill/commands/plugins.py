"""Components out of the user's own file, where the command line names it; no recipe can."""

import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, cast

from pydantic import ValidationError
from pydantic.errors import PydanticErrorMixin

from potstill.commands.list import ROLES
from potstill.core.component import Component
from potstill.core.errors import UserError
from potstill.recipe.wording import expected, shown

_DIGITS = 12  # of the hash, in hexadecimal: a version must stay exact where JSON reads numbers as floats


def load(path: Path) -> list[str]:
    """Run a Python file and register the components that it defines; their kinds, each with its role.

    The file's content becomes the components' version, and so part of the fingerprint of every stage that uses one: a stage is
    done again when the file changes. Modules that the file imports do not count.

    Raises:
        UserError: the file is missing or no Python, ends in an error, defines no component, a kind that exists, or a component
            that no recipe could use.
    """
    if not path.is_file():
        raise UserError(f"--plugin {path}: no such file; name a Python file that defines a reward, or another component")
    source = path.read_bytes()
    before = _registered()
    module = _execute(path, source)
    new = {name: cls for name, cls in _registered().items() if before.get(name) is not cls}
    own = [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__]
    if wrong := [f"{_line_of(cls, source)}{fault}" for cls in own if issubclass(cls, Component) for fault in _faults(cls, new)]:
        for name in new:
            role, _, kind = name.partition(" ")
            del ROLES[role].kinds[kind]
        raise UserError("\n".join(f"--plugin {path}: {fault}" for fault in wrong))
    if not new:
        raise UserError(
            f'--plugin {path}: defines no component; write such as `class Short(Reward, kind="short")`, with '
            "`from potstill.rewards import Reward`"
        )
    for cls in new.values():
        cls.version = int(hashlib.sha256(source).hexdigest()[:_DIGITS], 16)
    return sorted(new)


def _registered() -> dict[str, type[Component]]:
    return {f"{role} {kind}": cls for role, of in ROLES.items() for kind, cls in of.kinds.items()}


def _faults(cls: type[Component], new: dict[str, type[Component]]) -> Iterator[str]:
    """Why no recipe could use a component, each with the remedy."""
    name = cls.__name__
    if cls not in new.values():
        if not new or vars(cls).get("kind") is not None:  # else a base of others
            base = cls.__bases__[0].__name__
            yield f'class {name} has no kind, so no recipe can name it; write class {name}({base}, kind="{name.lower()}")'
        return
    if missing := sorted(cls.__abstractmethods__):
        yield f"class {name} lacks {' and '.join(missing)}; write def {missing[0]}(self, …) as its base class has it"
    for field, found in cls.model_fields.items():
        if not found.is_required() and not _takes(cls, field, value := found.get_default(call_default_factory=True)):
            yield f"class {name}: the default of {field} is {shown(value)}, and must be {expected(found.annotation)}"
    for attribute, plain in _class_variables(cls).items():
        if not isinstance(value := getattr(cls, attribute), plain):
            yield f"class {name}: {attribute} is {shown(value)}, and must be {expected(plain)}"


def _takes(cls: type[Component], field: str, value: Any) -> bool:
    """Whether a field's own annotation lets a value pass."""
    try:
        cls.model_validate({field: value})
    except ValidationError as error:
        return all(each["loc"][:1] != (field,) for each in error.errors())
    except TypeError:  # abstract, which is told by itself
        return True
    return True


def _class_variables(cls: type[Component]) -> dict[str, type]:
    """The attributes of its role that are text, a number or a truth value, each with its type."""
    found: dict[str, type] = {}
    for base in cls.__mro__:
        if issubclass(base, Component) and base.__module__.startswith("potstill.") and base is not Component:
            for name, annotation in inspect.get_annotations(base, eval_str=True).items():
                args = typing.get_args(annotation)
                if typing.get_origin(annotation) is ClassVar and args[0] in (str, bool):
                    found.setdefault(name, args[0])
    return found


def _line_of(cls: type, source: bytes) -> str:
    """`line 3: `, where its class statement stands."""
    lines = source.decode("utf-8", "replace").splitlines()
    number = next((i for i, line in enumerate(lines, 1) if re.match(rf"\s*class\s+{cls.__name__}\b", line)), None)
    return f"line {number}: " if number is not None else ""


def _execute(path: Path, source: bytes) -> ModuleType:
    name = f"potstill_plugin_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_loader(name, loader=None, origin=str(path))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    sys.modules[name] = module  # where dataclasses and pydantic look names up
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Field name .* shadows", UserWarning)
            exec(compile(source, str(path), "exec"), module.__dict__)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"--plugin {path}: {_place(error, path)}{_in_words(error)}") from error
    return module


def _in_words(error: BaseException) -> str:
    """An error of the file; what pydantic says of a field, in our words."""
    told = error.message if isinstance(error, PydanticErrorMixin) else str(error)
    field = next((found[1] for found in re.finditer(r"[`'\"](\w+)(?: = |['\"])", told)), "")
    match getattr(error, "code", None):
        case "model-field-missing-annotation" | "model-field-overridden":
            return (
                f"{field} has no type; write {field}: int = … (or float, bool, str) for a field that a recipe can set, or "
                f"{field}: ClassVar[int] = … for a constant"
            )
        case "schema-for-unknown-type":
            kind = re.search(r"(\w+)'>", told)
            what = f"of type {kind[1]}" if kind else "of a type"
            return f"a field is {what}, which no recipe can write; take bool, int, float, str, or a tuple of them"
    if isinstance(error, UserWarning):
        return f"the name {field} is taken by the component itself; call the field otherwise"
    return f"{type(error).__name__}: {told}"


def _place(error: BaseException, path: Path) -> str:
    """`line 3: `, the last line of the file that an error came through."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"line {error.lineno}: "
    lines = [frame.lineno for frame in _frames(error) if frame.filename == str(path)]
    return f"line {lines[-1]}: " if lines else ""


def _frames(error: BaseException) -> Iterator[traceback.FrameSummary]:
    return iter(cast("list[traceback.FrameSummary]", traceback.extract_tb(error.__traceback__)))
