"""wllama: llama.cpp for browsers, an npm package that a web export takes in. It is not shipped with this package."""

import base64
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from potstill.core.errors import UserError

PACKAGE = "@wllama/wllama"
VERSION = "3.13.0"
# SHA-512 of the archive, as the registry gave it when this version was tried
_INTEGRITY = "ZvoRdQAn+E+18EvQ9qS036gudiI9rbZRBJgG/qNICPPwrA0Y6SMMdbziz/j7K/0WxcbJlhaRraVIYsnEy732NA=="
_FILES = {  # what the page needs of the package, by its own name there, with its SHA-256
    "esm/index.min.js": ("wllama.js", "e7f3745ee508c111c22d178d23c52cc74016dd8cec39e4600d87e28d287d7981"),
    "esm/wasm/wllama.wasm": ("wllama.wasm", "79ac5be917b71d50571a4f584436a9f6baf6b6e57719d094ed8bd950e9a65780"),
    "LICENCE": ("LICENCE-wllama", "5866e3bd7e3cbd3f7c8bea6efd8a1e7fa7cc8de68c30f428aff7c6584a0fb720"),
}
_TIMEOUT_S = 300
_REMEDY = (
    f"on a machine that reaches the npm registry: npm pack {PACKAGE}@{VERSION}; then name the file that it makes: "
    "--wllama FILE.tgz, or wllama = 'FILE.tgz' in the recipe"
)


def wllama_problem(named: str) -> str:
    """Why the package cannot be had, as far as is known without asking the registry; empty where it may be."""
    if named:
        return "" if Path(named).expanduser().exists() else f"wllama: no file or folder '{named}'; {_REMEDY}"
    if _cached().is_file() or shutil.which("npm"):
        return ""
    return f"a web export needs the npm package {PACKAGE}, and npm is not here; install Node.js, or {_REMEDY}"


def wllama_files(named: str) -> dict[str, bytes]:
    """The package's files that a page needs, by the names that they get there.

    Args:
        named: the archive that `npm pack` makes, the package's folder, or the one in which `npm install` was run; empty: from
            the user's cache, else from the registry that npm is set to.

    Raises:
        UserError: it is not there, not to be had, or not the version that was tried.
    """
    path = Path(named).expanduser() if named else _packed()
    if path.is_dir():
        inner = path / "node_modules" / PACKAGE
        found = {name: _read((inner if inner.is_dir() else path) / name) for name in _FILES}
    else:
        found = _unpacked(_read(path), path)
    for name, (_, digest) in _FILES.items():
        if hashlib.sha256(found[name]).hexdigest() != digest:
            raise UserError(f"{path}: its {name} is not that of {PACKAGE} {VERSION}; {_REMEDY}")
    return {new_name: found[name] for name, (new_name, _) in _FILES.items()}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror}); {_REMEDY}") from error


def _unpacked(archive: bytes, path: Path) -> Mapping[str, bytes]:
    """The files of an archive whose digest is the one that the registry gave when this version was tried."""
    if base64.b64encode(hashlib.sha512(archive).digest()).decode() != _INTEGRITY:
        raise UserError(f"{path}: not the archive of {PACKAGE} {VERSION} (another SHA-512); {_REMEDY}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        members = {name: files.extractfile(f"package/{name}") for name in _FILES}
        return {name: member.read() if member is not None else b"" for name, member in members.items()}


def _cached() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "potstill" / f"wllama-{VERSION}.tgz"


def _packed() -> Path:
    """The archive in the user's cache, fetched by npm where it is not there: npm knows registry, mirror and proxy."""
    cached = _cached()
    if cached.is_file():
        return cached
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(wllama_problem(""))
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--ignore-scripts", "--pack-destination", folder]
        try:
            done = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise UserError(f"npm did not get {PACKAGE} within {_TIMEOUT_S} s; try again, or {_REMEDY}") from None
        made = list(Path(folder).glob("*.tgz"))
        if done.returncode or not made:
            said = " ".join((done.stderr or done.stdout).split())[-300:] or f"code {done.returncode}"
            raise UserError(f"npm could not get {PACKAGE} {VERSION} ({said}); {_REMEDY}")
        archive = made[0].read_bytes()
        _unpacked(archive, made[0])  # nothing else is kept
    cached.parent.mkdir(parents=True, exist_ok=True)
    part = cached.with_suffix(f".{os.getpid()}")
    part.write_bytes(archive)
    return part.replace(cached)
