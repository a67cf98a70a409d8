"""`check` tells what models and rows show together with the file's own mistakes: none waits until another one is mended."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from potstill.cli import main

RECIPE = """
name = "together"
data = { kind = "jsonl", path = "ROWS" }
prompts = { max_tokens = 64, max_prompt_tokens = 48 }

[[stage]]
name = "sft"
kind = "sft"
model = "path:STUDENT"

[[stage]]
name = "written"
kind = "generate"
model = "path:TEACHER"

[[stage]]
name = "kd"
kind = "distill"
student = "path:STUDENT"
teacher = "path:TEACHER"
samples = { max_new_tokens = 16 }

[[stage]]
name = "q4"
kind = "quantize"
model = "path:STUDENT"
group = 32

[[stage]]
name = "study"
kind = "evaluate"
study = [
    { name = "Plain", model = "path:STUDENT" },
    { name = "Teacher", model = "path:TEACHER", role = "teacher" },
]

[[stage]]
name = "files"
kind = "export"
model = "path:STUDENT"
formats = ["gguf"]
"""
# what is set, and the places of the problems that it makes
MISTAKES = {
    "a model that is none": ("sft.model=path:FOLDER/empty-0", ["sft.model"]),
    "rows of one stage that cannot be read": ("kd.data.path=FOLDER/broken.jsonl", ["kd.data"]),
    "a writer that is none": ("written.model=path:FOLDER/empty-1", ["written.model"]),
    "a teacher that is none": ("kd.teacher=path:FOLDER/empty-2", ["kd.teacher"]),
    "own answers that are too long": ("kd.samples.max_new_tokens=5000", ["kd.samples.max_new_tokens"] * 2),
    "a group that does not divide": ("q4.group=128", ["q4.group"]),
    "a question of no words": ('study.ask=[" "]', ["study.study[0].model"]),
    "one file twice": ("files.formats=['gguf', 'gguf']", ["files.formats"]),
    "an unknown field": ("sft.optim.lrr=1", ["sft.optim.lrr"]),
    "a value out of range": ("kd.ratio=1.5", ["kd.ratio"]),
    "a stage of nobody": ("q4.model=stage:sfft", ["q4.model"]),
}
DEPENDENT = ["own answers that are too long", "a group that does not divide"]
BELOW = [  # without what these take away, a dependent one cannot be asked
    "rows of one stage that cannot be read",
    "a teacher that is none",
    "a value out of range",
    "a stage of nobody",
]


@pytest.fixture(scope="module")
def recipe(family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    rows = [{"instruction": f"What is {i} plus {i % 7}?", "response": f"It is {i + i % 7}."} for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "broken.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]) + "{\n")
    for number in range(3):
        (folder / f"empty-{number}").mkdir()  # each its own: what is wrong with a model is said once
    text = RECIPE.replace("ROWS", str(folder / "rows.jsonl"))
    for name, path in (("STUDENT", family["student"]), ("TEACHER", family["teacher"])):
        text = text.replace(name, str(path))
    (folder / "together.toml").write_text(text)
    return folder / "together.toml"


def call(recipe: Path, *cases: str, json: bool = False) -> Any:
    words = [MISTAKES[case][0].replace("FOLDER", str(recipe.parent)) for case in cases]
    sets = [part for word in words for part in ("--set", word)]
    return CliRunner().invoke(main, ["check", str(recipe), *sets, *(["--json"] if json else [])])


def told(recipe: Path, *cases: str) -> set[tuple[str, str]]:
    found = json.loads(call(recipe, *cases, json=True).stdout)
    return {(problem["place"], problem["rule"]) for problem in found.get("problems", [])}


def test_the_recipe_without_mistakes_is_right(recipe: Path) -> None:
    assert call(recipe).exit_code == 0, call(recipe).output


def test_no_mistake_waits_for_another_one(recipe: Path) -> None:
    alone = {case: told(recipe, case) for case in MISTAKES}
    assert {case: sorted(place for place, _ in found) for case, found in alone.items()} == {
        case: places for case, (_, places) in MISTAKES.items()
    }
    for apart in (DEPENDENT, BELOW):
        cases = [case for case in MISTAKES if case not in apart]
        assert told(recipe, *cases) == set().union(*(alone[case] for case in cases))


def test_every_override_that_sets_nothing_is_told(recipe: Path) -> None:
    result = CliRunner().invoke(main, ["check", str(recipe), "--set", "stf.seed=1", "--set", "q4", "--set", "sft.seed=1"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert [line.partition(": ")[0] for line in result.stderr.splitlines()] == ["--set stf.seed=1", "--set q4"]


def test_the_files_own_mistakes_come_first_and_the_others_under_their_own_line(recipe: Path) -> None:
    result = call(recipe, "an unknown field", "a model that is none", "a group that does not divide")
    first, second = result.stderr.split("together.toml: ")[1:]
    assert (result.exit_code, result.stdout) == (2, "")
    assert first.startswith("1 problem\n  sft.optim.lrr = 1  no such field")
    assert second.startswith("2 problems of models, rows and this machine, as far as the file can be read\n  sft.model = ")
