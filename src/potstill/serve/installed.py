"""Whether the packages that serve are here; imports nothing, so that it is said at once."""

from importlib.util import find_spec

from potstill.core.errors import UserError

INSTALL = "pip install 'potstill[serve]'"


def check_installed() -> None:
    """Refuse to begin without the packages.

    Raises:
        UserError: which are missing, and the remedy.
    """
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(f"serving needs {' and '.join(missing)}; {INSTALL}")
