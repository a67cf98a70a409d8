"""Every recipe that comes with the package is right, can be planned without a network, and says what it is."""

import json
import tomllib
from pathlib import Path

import pytest

from potstill.commands.plan import estimate
from potstill.recipe.header import Recipe
from potstill.recipe.parse import load_recipe, parse_recipe
from potstill.stages import Stage
from potstill.stages.distill import Distill
from potstill.stages.sft import SFT

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
RECIPES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.toml"))
FEWER = {"programs": "data.instances=5", "stdlib": "data.share=0.02", "primer": "data.countries=20"}  # of rows made in code
TEXT = {"instruction": "Write a function that adds.", "response": "def add(a, b):\n    return a + b"}


def rows_for(data: dict) -> str:
    """Rows with every column that a recipe's data names, and those that its kind expects."""
    columns = {key: name for key, name in data.items() if key in ("instruction", "response", "context", "key", "tag")}
    lines = []
    for i in range(60):
        row = {key: f"{text} {i}" for key, text in TEXT.items()}
        row |= {"context": "", "category": "code", "title": f"Sums {i}", "responses": [row["response"]]}
        row |= {"id": str(i), "statement": row["instruction"], "generation": row["response"]}
        row |= {"tests": [{"input": "1\n", "output": "1\n"}]}
        row |= {name: f"{TEXT.get(key, key)} {i}" for key, name in columns.items()}
        lines.append(json.dumps(row))
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Load a shipped recipe, with a file of rows where it wants one; `fewer`: with fewer rows where these are made in code."""
    folder = tmp_path_factory.mktemp("rows")

    def load(name: str, *, fewer: bool = False) -> Recipe:
        data = tomllib.loads((FOLDER / name).read_text(encoding="utf-8"))["data"]
        if data["kind"] not in ("codeforces_cots", "dolly", "jsonl", "squad"):
            return load_recipe(FOLDER / name, (FEWER[data["kind"]],) if fewer else ())
        rows = folder / f"{Path(name).stem}.jsonl"
        rows.write_text(rows_for(data), encoding="utf-8")
        return load_recipe(FOLDER / name, (f"data.path={rows}",))

    return load


def test_there_are_recipes():
    assert "quickstart.toml" in RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_right_and_described(load, name):
    recipe = load(name)
    assert recipe.name == Path(name).stem.replace(".", "")
    assert recipe.header.description


@pytest.mark.parametrize("name", RECIPES)
def test_its_last_word_is_a_report(load, name):
    assert any(stage.kind == "report" for stage in load(name).stages)


@pytest.mark.parametrize("name", RECIPES)
def test_plan_needs_no_network(load, name, tmp_path):
    recipe = load(name, fewer=True)
    rows = [line.json() for line in estimate(recipe, tmp_path / "run", measure=False).lines]
    assert {row["stage"].partition("@")[0] for row in rows} == {stage.name for stage in recipe.stages}
    assert all(row["state"] == "to do" for row in rows)
    for row in rows:
        if row["kind"] in ("pretrain", "sft", "distill", "minillm", "grpo"):
            assert row["parameters"] > 0, row
            assert row["flops"] > 0, row
            assert row["memory_bytes"] > 16 * row["parameters"]
    assert not (tmp_path / "run").exists(), "planning writes nothing"


@pytest.mark.parametrize("name", RECIPES)
def test_a_stage_builds_itself_again_from_its_own_table(load, name):
    for stage in load(name).stages:
        again = Stage.parse(json.loads(json.dumps(stage.spec())))
        assert again == stage


def test_a_student_is_fitted_as_often_as_its_control(load):
    """What distillation is compared with must have seen as many rows in as many steps; rates are each method's own."""
    for name in RECIPES:
        stages = load(name).stages
        for kd in (stage for stage in stages if isinstance(stage, Distill)):
            tuned = (stage for stage in stages if isinstance(stage, SFT) and stage.model == kd.student)
            for control in (stage for stage in tuned if stage.data.kind != "stage"):  # what a teacher wrote is no control
                told = f"{name}: {kd.name} and {control.name} differ"
                assert control.optim.total_steps(1000) == kd.optim.total_steps(1000), told
                assert control.optim.batch_size == kd.optim.batch_size, told
                assert (control.data, control.prompts, control.per_seed) == (kd.data, kd.prompts, kd.per_seed), told


def test_every_known_kind_of_stage_is_shown_somewhere(load):
    assert {stage.kind for name in RECIPES for stage in load(name).stages} == set(Stage.kinds)


def test_planning_says_what_is_unknown(tmp_path):
    table = {
        "name": "far",
        "data": {"kind": "dolly"},
        "stage": [{"name": "sft", "kind": "sft", "model": "hf:somebody/something"}],
    }
    (row,) = (line.json() for line in estimate(parse_recipe(table), tmp_path / "run", measure=False).lines)
    assert row["parameters"] is None
    assert row["flops"] is None
