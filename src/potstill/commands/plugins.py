"""Components out of the user's own file, where the command line names it; no recipe can."""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from potstill.commands.list import ROLES
from potstill.core.component import Component
from potstill.core.errors import UserError

_DIGITS = 12  # of the hash, in hexadecimal: a version must stay exact where JSON reads numbers as floats


def load(path: Path) -> list[str]:
    """Run a Python file and register the components that it defines; their kinds, each with its role.

    The file's content becomes the components' version, and so part of the fingerprint of every stage that uses one: a stage is
    done again when the file changes. Modules that the file imports do not count.

    Raises:
        UserError: the file is missing or no Python, ends in an error, defines no component, or a kind that exists.
    """
    if not path.is_file():
        raise UserError(f"--plugin {path}: no such file; name a Python file that defines a reward, or another component")
    source = path.read_bytes()
    before = _registered()
    _execute(path, source)
    new = {name: cls for name, cls in _registered().items() if before.get(name) is not cls}
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


def _execute(path: Path, source: bytes) -> None:
    name = f"potstill_plugin_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_loader(name, loader=None, origin=str(path))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    sys.modules[name] = module  # where dataclasses and pydantic look names up
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"--plugin {path}: {_place(error, path)}{type(error).__name__}: {error}") from error


def _place(error: BaseException, path: Path) -> str:
    """`line 3: `, the last line of the file that an error came through."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"line {error.lineno}: "
    lines = [frame.lineno for frame in _frames(error) if frame.filename == str(path)]
    return f"line {lines[-1]}: " if lines else ""


def _frames(error: BaseException) -> Iterator[traceback.FrameSummary]:
    return iter(cast("list[traceback.FrameSummary]", traceback.extract_tb(error.__traceback__)))
