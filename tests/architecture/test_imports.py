"""The shape of the package: imports point down only, and nothing heavy comes before it is needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import potstill

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "numpy", "pydantic", "datasets", "rich", "matplotlib", "babel", "safetensors")


def loaded_by(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded after some code."""
    script = f"import sys\n{code}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.splitlines()[-1].split())


def test_imports_point_down_only():
    lint_imports = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint_imports, "--no-cache"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Imports point down only KEPT" in done.stdout
    assert "The hub's libraries are met in edges alone KEPT" in done.stdout


def test_importing_the_package_costs_nothing():
    assert loaded_by("import potstill") == set()


def test_importing_the_command_line_costs_nothing():
    assert loaded_by("import potstill.cli") == set()


def test_the_core_costs_nothing():
    code = "from potstill.core import artifact, errors, progress, types"
    assert loaded_by(code) == set()


@pytest.mark.parametrize("name", potstill.__all__)
def test_every_public_name_is_there(name):
    assert getattr(potstill, name) is not None
    assert name in dir(potstill)


def test_an_editor_sees_the_same_public_names():
    import ast

    tree = ast.parse((ROOT / "src" / "potstill" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: node.module for node in imports for alias in node.names if alias.asname == alias.name}
    assert seen == potstill._WHERE


def test_an_editor_sees_misspelt_fields_and_names(tmp_path):
    pyright = Path(sys.executable).with_name("pyright")
    if not pyright.is_file():
        pytest.skip("pyright is not installed")
    script = tmp_path / "script.py"
    script.write_text("import potstill\npotstill.SFT(modle='x')\npotstill.Destil\npotstill.Optim(lr=1e-3)\n")
    done = subprocess.run(
        [pyright, "--outputjson", "--pythonpath", sys.executable, script], capture_output=True, text=True, cwd=tmp_path
    )
    if not done.stdout.startswith("{"):
        pytest.skip("pyright cannot run here")
    told = [(d["range"]["start"]["line"], d["message"]) for d in json.loads(done.stdout)["generalDiagnostics"]]
    assert (1, 'No parameter named "modle"') in told
    assert any(line == 2 and '"Destil" is not a known attribute' in message for line, message in told)
    assert not [line for line, _ in told if line == 3]


def test_public_names_have_docstrings():
    bare = [name for name in potstill.__all__ if name != "__version__" and not getattr(potstill, name).__doc__]
    assert bare == []


def test_another_name_is_not():
    with pytest.raises(AttributeError, match="module 'potstill' has no attribute 'Destil'"):
        potstill.Destil  # noqa: B018


def test_every_file_of_a_role_names_its_kind():
    """One new file is enough for a new component: whatever lies in a role's package is discovered."""
    from potstill.commands.list import ROLES

    for role in ROLES.values():
        assert role.kinds, role
        for kind, cls in role.kinds.items():
            assert cls.kind == kind
            assert cls.role == role.role
            assert cls.__doc__, f"{kind}: `potstill list` shows its docstring"
