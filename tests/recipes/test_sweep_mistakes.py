"""What a recipe may sweep, what its stages are then called, and the message of each mistake."""

import copy
import json
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import Problem, RecipeError, UserError
from potstill.recipe.header import Recipe
from potstill.recipe.parse import parse_recipe
from potstill.recipe.sweep import Sweep
from potstill.run.graph import nodes_of
from potstill.stages import Stage
from potstill.stages.best import Best
from potstill.stages.distill import Distill

STAGES = """
[[stage]]
name = "base"
kind = "pretrain"

[[stage]]
name = "sft"
kind = "sft"
model = "stage:base"

[[stage]]
name = "kd"
kind = "distill"
student = "stage:base"
teacher = "stage:sft"
temperature = 1.0

[[stage]]
name = "kd4"
kind = "quantize"
model = "stage:kd"
"""
HEAD = 'name = "t"\ndata = "primer"\n'


def parsed(sweep: str, *overrides: str, stages: str = STAGES, head: str = HEAD) -> Recipe:
    return parse_recipe(tomllib.loads(f"{head}sweep = {sweep}\n{stages}"), "t.toml", overrides)


def message(sweep: str, *overrides: str, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        parsed(sweep, *overrides, **more)
    return str(caught.value)


def called(recipe: Recipe) -> list[str]:
    return [stage.name for stage in recipe.stages]


def best(recipe: Recipe) -> Best:
    (found,) = (stage for stage in recipe.stages if isinstance(stage, Best))
    return found


MISTAKES = {
    "no table": ("3", "sweep = 3  must be a table"),
    "unknown stage": ('{ "kdd.optim.lr" = [1e-4] }', "sweep.\"kdd.optim.lr\"  no such stage; did you mean 'kd'?"),
    "unknown field": ('{ "kd.optim.lrr" = [1, 2] }', "sweep.\"kd.optim.lrr\"  no such field; did you mean 'lr'?"),
    "unknown field of the stage": (
        '{ "kd.tmp" = [1, 2] }',
        "sweep.\"kd.tmp\"  no such field; did you mean 'temperature' or 'samples.temperature'?",
    ),
    "no field": ('{ "kd" = [1] }', 'sweep."kd"  name a field of the stage, such as kd.optim.lr'),
    "no list": ('{ "kd.optim.lr" = 1e-4 }', 'sweep."kd.optim.lr" = 0.0001  must be a list: [ … ]'),
    "empty list": ('{ "kd.optim.lr" = [] }', 'sweep."kd.optim.lr" = []  needs at least 1'),
    "first value": ('{ "kd.optim.lr" = [2.0, 1e-4] }', 'sweep."kd.optim.lr"[0] = 2.0  must be at most 1'),
    "later value": ('{ "kd.optim.lr" = [1e-4, 1e-3, "a"] }', "sweep.\"kd.optim.lr\"[2] = 'a'  must be a number"),
    "value inside a table": (
        '{ "kd.divergence" = ["forward_kl", { kind = "generalised_jsd", beta = 2 }] }',
        'sweep."kd.divergence"[1].beta = 2  must be less than 1',
    ),
    "same value twice": (
        '{ "kd.optim.lr" = [1e-4, 1e-3, 0.0001] }',
        'sweep."kd.optim.lr"[2] = 0.0001  stands there already, as number 0',
    ),
    "same value in other words": (
        '{ "kd.divergence" = ["forward_kl", { kind = "forward_kl" }] }',
        'sweep."kd.divergence"[1] = forward_kl  stands there already, as number 0',
    ),
    "a reference to nobody": (
        '{ "kd.teacher" = ["stage:sft", "stage:sftt"] }',
        "sweep.\"kd.teacher\"[1] = 'stage:sftt'  no earlier stage of that name; did you mean 'sft'?",
    ),
    "a first reference to nobody": (
        '{ "kd.teacher" = ["stage:sftt", "stage:sft"] }',
        "sweep.\"kd.teacher\"[0] = 'stage:sftt'  no earlier stage of that name; did you mean 'sft'?",
    ),
    "no training stage": (
        '{ "kd4.group" = [32, 64] }',
        "sweep.\"kd4.group\"  'kd4' is of kind quantize; what is validated while training can be swept: "
        "distill, grpo, heal, minillm, sft",
    ),
    "not validated": (
        '{ "base.optim.lr" = [1e-4] }',
        "sweep.\"base.optim.lr\"  'base' is of kind pretrain; what is validated while training can be swept: "
        "distill, grpo, heal, minillm, sft",
    ),
    "seed": (
        '{ "kd.seed" = [1, 2] }',
        'sweep."kd.seed"  seeds are not swept, for the best of several is luck; '
        "give the recipe's own `seeds`, and per_seed = true",
    ),
    "name": ('{ "kd.name" = ["a", "b"] }', 'sweep."kd.name"  says which stage this is, and is not swept'),
    "what is measured": (
        '{ "kd.validation.rows" = [1, 2] }',
        'sweep."kd.validation.rows"  decides what is measured, so its values could not be compared',
    ),
    "through a number": ('{ "kd.temperature.x" = [1] }', "sweep.\"kd.temperature.x\"  'temperature' is not a table"),
    "one inside the other": (
        '{ "kd.optim.lr" = [1e-4], "kd.optim" = [{ epochs = 2 }] }',
        "sweep.\"kd.optim.lr\"  'kd.optim' is swept too, and holds it; sweep one of them",
    ),
    "picked by what": (
        '{ by = "validation_nl" }',
        "sweep.by = 'validation_nl'  must be one of validation_acceptance, validation_answer, validation_exact_match, "
        "validation_kl_on_answers, validation_kl_to_teacher, validation_nll, validation_pass_at_1, validation_pass_at_k, "
        "validation_python_parses, validation_repaired, validation_reverse_kl_on_answers, validation_rouge_l; "
        "did you mean 'validation_nll'?",
    ),
    "a part of a component without its kind": (
        '{ "kd.divergence.beta" = [0.1, 0.5] }',
        "kd.divergence  needs a kind: one of forward_kl, generalised_jsd, reverse_kl, skew_kl, skew_reverse_kl, "
        "total_variation, weighted_sum",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_one_mistake_one_message(case: str) -> None:
    sweep, expected = MISTAKES[case]
    assert message(sweep) == f"t.toml: 1 problem\n  {expected}"


def test_all_values_that_are_wrong_are_told_at_once() -> None:
    assert message('{ "kd.optim.lr" = ["a", 1e-4, 2.0], "kd.ratio" = [0.5, 2], "sft.optim.epochs" = [0] }') == (
        "t.toml: 4 problems\n"
        "  sweep.\"kd.optim.lr\"[0] = 'a'     must be a number\n"
        '  sweep."kd.optim.lr"[2] = 2.0     must be at most 1\n'
        '  sweep."kd.ratio"[1] = 2          must be at most 1\n'
        '  sweep."sft.optim.epochs"[0] = 0  must be more than 0'
    )


def test_a_sweep_without_validation_is_refused() -> None:
    stages = STAGES.replace("temperature = 1.0", "validation = { times = 0 }")
    told = "  kd.validation.times = 0  must be at least 1: the sweep of 'kd' picks by its validations"
    assert message('{ "kd.ratio" = [0.1, 0.5] }', stages=stages) == f"t.toml: 1 problem\n{told}"


def test_a_combination_that_cannot_be_is_told() -> None:
    recipe = parsed('{ "kd.ratio" = [0.1, 0.5] }')
    base = recipe.stages[2]

    def judge(raw: dict[str, Any]) -> tuple[Stage, list[Problem]]:
        wrong = [Problem("kd", "too hot for it")] if (raw["ratio"], raw["temperature"]) == (0.5, 4.0) else []
        return base.model_copy(update={"ratio": raw["ratio"], "temperature": raw["temperature"]}), wrong

    sweep = Sweep("kd", "kd", {"ratio": [0.1, 0.5], "temperature": [1.0, 4.0]}, "validation_nll")
    _, problems = sweep.expand({}, judge)
    assert problems == [Problem("sweep", "with kd.ratio = 0.5, kd.temperature = 4.0: kd too hot for it")]


def test_nobody_may_write_the_name_of_a_swept_value() -> None:
    rule = "must be letters, digits, '-' or '_', begin with a letter, and not be one of "
    told = message("{}", stages=STAGES.replace('"kd4"', '"kd.lr=0.1"'))
    assert told.startswith(f"t.toml: 1 problem\n  stage[3].name = 'kd.lr=0.1'  {rule}")
    assert "no earlier stage of that name" in message(
        '{ "kd.optim.lr" = [0.1] }', stages=STAGES.replace('"stage:kd"', '"stage:kd.lr=0.1"')
    )


@pytest.mark.parametrize("seed", range(2))
def test_random_damage_is_told_in_our_words(seed: int) -> None:
    chance = random.Random(seed)
    junk = [0, 1.5, True, "", "x", "stage:kd", [], [[]], {}, {"kind": []}, [1, "a"], [1e-3, 1e-3], 10**40, [None]]
    told = []
    for _ in range(150):
        table = tomllib.loads(f'{HEAD}sweep = {{ "kd.optim.lr" = [1e-4, 1e-3], "kd.ratio" = [0.5] }}\n{STAGES}')
        places = ["kd", "kd.optim", "kd.optim.lr", "kd.optim.lr.x", "kd..", "kd.teacher", "sft.optim", "", ".", "by", "kd.data"]
        table["sweep"][chance.choice(places)] = copy.deepcopy(chance.choice(junk))
        try:
            parse_recipe(table)
        except RecipeError as error:
            told.append(str(error))
    assert len(told) > 100
    assert [text for text in told if any(word in text for word in ("Input should", "Value error", "validator", "{{"))] == []


# What it becomes


def test_each_value_is_a_stage_and_the_best_has_the_name() -> None:
    recipe = parsed('{ "kd.optim.lr" = [1e-5, 5e-4] }')
    assert called(recipe) == ["base", "sft", "kd.lr=1e-05", "kd.lr=0.0005", "kd", "kd4"]
    assert [stage.optim.lr for stage in recipe.stages if isinstance(stage, Distill)] == [1e-5, 5e-4]
    kept = best(recipe)
    assert kept.candidates == ("stage:kd.lr=1e-05", "stage:kd.lr=0.0005")
    assert kept.values == ({"optim.lr": 1e-5}, {"optim.lr": 5e-4})
    assert kept.by == "validation_rouge_l"
    assert best(parsed('{ by = "validation_nll", "kd.optim.lr" = [1e-5] }')).by == "validation_nll"


def test_several_fields_of_a_stage_are_combined() -> None:
    recipe = parsed('{ "kd.ratio" = [0.1, 0.9], "kd.divergence" = ["forward_kl", { kind = "generalised_jsd", beta = 0.5 }] }')
    assert called(recipe)[2:6] == [
        "kd.ratio=0.1,divergence=forward_kl",
        "kd.ratio=0.1,divergence=generalised_jsd-beta-0.5",
        "kd.ratio=0.9,divergence=forward_kl",
        "kd.ratio=0.9,divergence=generalised_jsd-beta-0.5",
    ]


def test_fields_of_several_stages_are_swept_apart() -> None:
    recipe = parsed('{ "kd.optim.lr" = [1e-5, 5e-4], "sft.optim.lr" = [1e-5, 5e-4, 1e-3] }')
    assert called(recipe) == [
        *("base", "sft.lr=1e-05", "sft.lr=0.0005", "sft.lr=0.001", "sft"),
        *("kd.lr=1e-05", "kd.lr=0.0005", "kd", "kd4"),
    ]


def test_names_do_not_change_when_values_are_added_and_do_not_collide() -> None:
    teachers = '{ "kd.teacher" = ["stage:sft", "stage:base"] }'
    assert called(parsed(teachers))[2:4] == ["kd.teacher=stage-sft", "kd.teacher=stage-base"]
    long = [f"hf:{'x' * 60}/{i}" for i in range(3)]
    names = called(parsed(json.dumps({"kd.teacher": long}).replace(":", "=", 1)))[2:5]
    assert len(set(names)) == 3
    assert max(map(len, names)) < 64
    assert called(parsed(json.dumps({"kd.teacher": long[1:]}).replace(":", "=", 1)))[2:4] == names[1:]


def test_fields_of_one_last_word_are_written_out() -> None:
    stages = STAGES.replace("temperature = 1.0", 'divergence = { kind = "generalised_jsd", beta = 0.5 }')
    recipe = parsed('{ "kd.divergence.beta" = [0.1, 0.5], "kd.optim.lr" = [1e-3] }', stages=stages)
    assert called(recipe)[2] == "kd.beta=0.1,lr=0.001"
    assert [stage.divergence.spec()["beta"] for stage in recipe.stages if isinstance(stage, Distill)] == [0.1, 0.5]


def test_a_swept_stage_builds_itself_again_from_its_own_table() -> None:
    for stage in parsed('{ "kd.divergence" = ["forward_kl", { kind = "skew_kl" }], "sft.optim.betas" = [[0.9, 0.95]] }').stages:
        assert Stage.parse(json.loads(json.dumps(stage.spec()))) == stage


def test_every_seed_has_its_best_and_sees_all_seeds_its_own_first() -> None:
    stages = STAGES.replace("temperature = 1.0", "per_seed = true")
    nodes = {
        node.id: node for node in nodes_of(parsed('{ "kd.ratio" = [0, 1] }', stages=stages, head=f"{HEAD}seeds = [1, 2]\n"))
    }
    assert [ident for ident in nodes if ident.startswith("kd.")] == [
        "kd.ratio=0@1",
        "kd.ratio=0@2",
        "kd.ratio=1@1",
        "kd.ratio=1@2",
    ]
    assert nodes["kd@1"].inputs["kd.ratio=0"] == ("kd.ratio=0@1", "kd.ratio=0@2")
    assert nodes["kd@2"].inputs["kd.ratio=0"] == ("kd.ratio=0@2", "kd.ratio=0@1")
    assert nodes["kd4@2"].inputs == {"kd": ("kd@2",)}


# Ways to write it


def test_dotted_keys_need_no_quotes() -> None:
    table = tomllib.loads(f"{HEAD}{STAGES}") | tomllib.loads("[sweep]\nkd.optim.lr = [1e-5, 1e-4]\nkd.ratio = [0.5]")
    assert called(parse_recipe(table))[2:4] == ["kd.lr=1e-05,ratio=0.5", "kd.lr=0.0001,ratio=0.5"]


SWEPT = '{ "kd.optim.lr" = [1e-5, 5e-4] }'


@pytest.mark.parametrize("override", ["sweep.kd.optim.lr=[1e-3]", 'sweep."kd.optim.lr"=[1e-3]', 'sweep={"kd.optim.lr"=[1e-3]}'])
def test_overrides_change_what_is_swept(override: str) -> None:
    assert called(parsed(SWEPT, override)) == ["base", "sft", "kd.lr=0.001", "kd", "kd4"]


def test_overrides_add_to_a_sweep_or_end_it() -> None:
    assert called(parsed(SWEPT, "sweep.kd.ratio=[1]"))[2:4] == ["kd.lr=1e-05,ratio=1", "kd.lr=0.0005,ratio=1"]
    assert called(parsed(SWEPT, "sweep={}", "kd.optim.lr=1e-3")) == ["base", "sft", "kd", "kd4"]
    assert called(parsed("{}", 'sweep."sft.ratio"=[]', "sweep={}")) == ["base", "sft", "kd", "kd4"]


@pytest.mark.parametrize("override", ["kd.optim.lr=1e-3", "kd.optim={ lr = 1e-3 }"])
def test_an_override_of_what_is_swept_is_refused(override: str) -> None:
    told = "'kd.optim.lr' is swept; give its values with --set 'sweep.kd.optim.lr=[ … ]'"
    assert message(SWEPT, override) == f"--set {override}: {told}"


def test_other_fields_of_a_swept_stage_may_be_overridden() -> None:
    recipe = parsed(SWEPT, "kd.optim.epochs=7")
    assert [stage.optim.epochs for stage in recipe.stages if isinstance(stage, Distill)] == [7, 7]


def test_the_given_table_is_left_alone() -> None:
    table = tomllib.loads(f"{HEAD}sweep = {SWEPT}\n{STAGES}")
    before = copy.deepcopy(table)
    parse_recipe(table, overrides=("sweep.kd.optim.lr=[1e-3]",))
    assert table == before


def test_shipped_sweeps_search_the_control_as_they_search_the_student() -> None:
    folder = Path(__file__).resolve().parents[2] / "recipes"
    for name in ("small/lr-sweep.toml", "paper/dolly-en-lr.toml"):
        sweep = tomllib.loads((folder / name).read_text(encoding="utf-8"))["sweep"]
        assert sweep["sft.optim.lr"] == sweep["kd.optim.lr"], name
