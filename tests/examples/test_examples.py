"""Examples run, and what README and docs show to be typed is accepted by the package as it stands."""

import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest

import potstill
from potstill.stages.base import Stage

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list:
    """Every fenced block of a language, named by its page and number."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for number, code in enumerate(re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S), 1):
            found.append(pytest.param(code, id=f"{page.name}-{number}"))
    return found


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One folder for all examples: the later ones build on what the earlier ones left."""
    return tmp_path_factory.mktemp("examples")


@pytest.mark.xdist_group("examples")
@pytest.mark.parametrize("script", EXAMPLES, ids=[script.stem for script in EXAMPLES])
def test_example_runs(script, out, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(sys, "argv", [str(script), str(out)])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip()
    potstill.Divergence.kinds.pop("squared_hellinger", None)  # an example's own component must not reach other tests


def test_every_stage_has_an_example():
    assert [script.name[:2] for script in EXAMPLES] == [f"{n:02}" for n in range(1, 11)]


@pytest.mark.parametrize("code", [block for block in blocks("toml") if "[[stage]]" in block.values[0]])
def test_recipe_on_a_page_parses(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("question,answer\nWho?,Ann\n")  # the file that a page's recipe names
    recipe = tomllib.loads(code)
    if "name" in recipe:
        potstill.parse_recipe(recipe)
    else:  # stages to be added to a recipe of the reader's own
        for stage in recipe["stage"]:
            header = {"data": {"kind": "primer"}} if "data" in Stage.kinds[stage["kind"]].model_fields else {}
            assert Stage.parse(header | stage).name == stage["name"]


def test_pages_show_recipes():
    assert len([block for block in blocks("toml") if "[[stage]]" in block.values[0]]) >= 2


@pytest.mark.parametrize("code", [block for block in blocks("toml") if "[[stage]]" not in block.values[0]])
def test_toml_on_a_page_is_toml(code):
    tomllib.loads(code)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_on_a_page_compiles(code):
    compile(code, "page", "exec")


def test_reference_is_up_to_date():
    page = runpy.run_path(str(ROOT / "docs" / "generate.py"))["page"]()
    assert (ROOT / "docs" / "reference.md").read_text(encoding="utf-8") == page, "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_local_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in menu]
