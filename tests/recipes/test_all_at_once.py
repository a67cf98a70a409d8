"""No mistake hides another one, and none is made up: the problems of two mistakes are those of the one and of the other."""

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import RecipeError
from potstill.recipe.parse import parse_recipe

Found = set[tuple[str, str]]


def good() -> dict[str, Any]:
    optim = {"lr": 1e-3, "epochs": 1.0}
    return {
        "name": "good",
        "data": {"kind": "primer", "countries": 20},
        "prompts": {"max_tokens": 96, "max_prompt_tokens": 48},
        "stage": [
            {"name": "base", "kind": "pretrain", "optim": dict(optim)},
            {"name": "sft", "kind": "sft", "model": "stage:base", "optim": dict(optim)},
            {"name": "said", "kind": "cache", "teacher": "stage:sft", "signal": "topk", "temperature": 2.0},
            {
                "name": "kd",
                "kind": "distill",
                "student": "stage:base",
                "teacher": "stage:sft",
                "cache": "stage:said",
                "temperature": 2.0,
                "optim": dict(optim),
            },
            {
                "name": "study",
                "kind": "evaluate",
                "study": [
                    {"name": "Teacher", "model": "stage:sft", "role": "teacher"},
                    {"name": "KD", "model": "stage:kd", "role": "kd"},
                ],
            },
            {"name": "report", "kind": "report", "study": "stage:study"},
        ],
    }


# what is set at which place (None: taken away), and the place that the message must name
MISTAKES: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "unknown in the header": (("sedes",), [1], "sedes"),
    "a stage's field in the header": (("learning_rate",), 1e-3, "learning_rate"),
    "header's range": (("checkpoint",), {"every_minutes": 0}, "checkpoint.every_minutes"),
    "header's seeds": (("seeds",), [1, 1], "seeds"),
    "shared data": (("data", "limt"), 5, "data.limt"),
    "shared prompts": (("prompts", "sytem"), "Be brief.", "prompts.sytem"),
    "sweep of nobody": (("sweep",), {"kdd.ratio": [0.5]}, 'sweep."kdd.ratio"'),
    "a swept value": (("sweep",), {"sft.optim.lr": [1e-4, "b"]}, 'sweep."sft.optim.lr"[1]'),
    "no layers": (("stage", 0, "shape"), {"layers": 0}, "base.shape.layers"),
    "heads that do not divide": (("stage", 0, "text"), "row", "base.text"),
    "unknown in a stage": (("stage", 0, "stepz"), 3, "base.stepz"),
    "tokenizer's folder": (("stage", 0, "tokenizer"), "path:nowhere/at/all", "base.tokenizer"),
    "no scheme": (("stage", 1, "model"), "Qwen/Qwen2.5-0.5B", "sft.model"),
    "below the last stage": (("stage", 1, "log"), ["tensorboard"], "sft.log"),
    "a table that is none": (("stage", 1, "validation"), 0.1, "sft.validation"),
    "an adapter's rank": (("stage", 1, "adapter"), {"r": 0}, "sft.adapter.r"),
    "an init without its field": (("stage", 1, "init"), {"kind": "layers"}, "sft.init"),
    "a file of its own": (("stage", 1, "data"), {"kind": "jsonl", "path": "none.jsonl"}, "sft.data.path"),
    "unknown in optim": (("stage", 1, "optim", "learning_rate"), 1.0, "sft.optim.learning_rate"),
    "unknown in a cache": (("stage", 2, "micro_batch"), 8, "said.micro_batch"),
    "a choice": (("stage", 2, "precision"), "fp8", "said.precision"),
    "no student": (("stage", 3, "student"), None, "kd.student"),
    "a teacher of nobody": (("stage", 3, "teacher"), "stage:techer", "kd.teacher"),
    "a mismatch": (("stage", 3, "temperature"), 4.0, "kd.temperature"),
    "a range": (("stage", 3, "ratio"), 1.5, "kd.ratio"),
    "misplaced": (("stage", 3, "beta"), 0.5, "kd.beta"),
    "alpha": (("stage", 3, "alpha"), 1.5, "kd.alpha"),
    "not a number": (("stage", 3, "optim", "lr"), "fast", "kd.optim.lr"),
    "a rule between fields": (("stage", 3, "optim", "betas"), [0.9, 1.0], "kd.optim"),
    "unknown divergence": (("stage", 3, "divergence"), "forward_lk", "kd.divergence"),
    "a row's model": (("stage", 4, "study", 0, "model"), "stage:sftt", "study.study[0].model"),
    "a row's role": (("stage", 4, "study", 1, "role"), "student", "study.study[1].role"),
    "a row's field": (("stage", 4, "study", 1, "nme"), "x", "study.study[1].nme"),
    "no such primary": (("stage", 4, "primary"), "bleu", "study"),
    "misplaced decoding": (("stage", 4, "do_sample"), True, "study.do_sample"),
    "a metric": (("stage", 4, "metrics"), ["rouge_l", "blue"], "study.metrics[1]"),
    "a study that is a model": (("stage", 5, "study"), "stage:kd", "report.study"),
    "a report's wish": (("stage", 5, "formt"), "pdf", "report.formt"),
}
APART = [  # one of the two makes the other one what it is
    {"no such primary", "a metric"},
    {"sweep of nobody", "a swept value"},  # both are written in one place
]
TOGETHER = [case for case in MISTAKES if case not in ("no such primary", "sweep of nobody")]


def damaged(*cases: str) -> dict[str, Any]:
    table = good()
    for case in cases:
        (*way, last), value, _ = MISTAKES[case]
        inner: Any = table
        for key in way:
            inner = inner[key]
        if value is None:
            del inner[last]
        else:
            inner[last] = copy.deepcopy(value)
    return table


def told(*cases: str) -> Found:
    try:
        parse_recipe(damaged(*cases))
    except RecipeError as error:
        return {(problem.place, problem.rule) for problem in error.problems}
    return set()


@pytest.fixture(scope="module")
def alone() -> dict[str, Found]:
    return {case: told(case) for case in MISTAKES}


def test_the_recipe_without_mistakes_is_right():
    assert parse_recipe(good()).name == "good"


@pytest.mark.parametrize("case", MISTAKES)
def test_each_mistake_is_one_problem_at_its_place(case: str):
    assert [place for place, _ in told(case)] == [MISTAKES[case][2]]


def test_two_mistakes_are_two_problems(alone: dict[str, Found]):
    wrong = []
    for pair in itertools.combinations(MISTAKES, 2):
        if set(pair) in APART:
            continue
        expected = alone[pair[0]] | alone[pair[1]]
        if (found := told(*pair)) != expected:
            wrong.append((pair, found ^ expected))
    assert wrong == []


@pytest.mark.parametrize("seed", range(30))
def test_ten_mistakes_are_ten_problems(seed: int, alone: dict[str, Found]):
    cases = random.Random(seed).sample(TOGETHER, 10)
    assert told(*cases) == set().union(*(alone[case] for case in cases))


def test_all_mistakes_together_are_all_told(alone: dict[str, Found]):
    assert told(*TOGETHER) == set().union(*(alone[case] for case in TOGETHER))


def test_they_come_in_the_order_of_the_file():
    cases = list(MISTAKES)
    random.Random(0).shuffle(cases)
    with pytest.raises(RecipeError) as caught:
        parse_recipe(damaged(*cases))
    heads = [problem.place.split(".")[0].split("[")[0] for problem in caught.value.problems]
    stages = [head for head in heads if head in ("base", "sft", "said", "kd", "study", "report")]
    assert stages == sorted(stages, key=["base", "sft", "said", "kd", "study", "report"].index)
    assert heads[len(heads) - len(stages) :] == stages, "the header comes first"
    assert heads[:2] == ["data", "prompts"], "these two stood in the recipe before the others were added"


def test_a_default_in_place_of_a_wrong_value_is_no_mismatch():
    table = damaged()
    table["stage"][2]["temprature"] = table["stage"][2].pop("temperature")
    with pytest.raises(RecipeError) as caught:
        parse_recipe(table)
    assert [problem.place for problem in caught.value.problems] == ["said.temprature"]


def test_a_misspelt_kind_hides_nothing_that_is_wrong_beside_it():
    table = good()
    table["data"] = {"kind": "prime", "limit": 0}
    table["stage"][1] |= {"kind": "sfft", "stepz": 3, "model": "stage:bse"}
    table["stage"][3] |= {"divergence": {"kind": "generalized_jsd", "beta": 2}}
    with pytest.raises(RecipeError) as caught:
        parse_recipe(table)
    assert [problem.place for problem in caught.value.problems] == [
        *("data", "data.limit", "sft.kind", "sft.model", "sft.stepz", "kd.divergence", "kd.divergence.beta")
    ]


def test_references_and_files_of_a_stage_of_no_known_kind_are_looked_at(tmp_path: Path):
    table = good()
    table["stage"][3] |= {"kind": "teach", "student": "path:" + str(tmp_path / "none"), "teacher": "stage:techer"}
    with pytest.raises(RecipeError) as caught:
        parse_recipe(table)
    assert [problem.place for problem in caught.value.problems] == ["kd.kind", "kd.student", "kd.teacher"]


def test_references_beside_a_rule_that_is_broken_are_looked_at():
    table = good()
    table["stage"][4]["study"] = [{"name": "KD", "model": "stage:kd"}, {"name": "KD", "model": "stage:kdd"}]
    with pytest.raises(RecipeError) as caught:
        parse_recipe(table)
    assert [problem.place for problem in caught.value.problems] == ["study.study", "study.study[1].model"]


def test_a_swept_value_that_does_not_fit_the_cache_is_told():
    table = good()
    table["sweep"] = {"kd.temperature": [2.0, 4.0]}
    with pytest.raises(RecipeError) as caught:
        parse_recipe(table)
    assert [(problem.place, problem.rule) for problem in caught.value.problems] == [
        ('sweep."kd.temperature"[1]', "the cache 'said' was made for 2; give both the same")
    ]


def test_the_same_missing_file_is_told_where_each_stage_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    table = damaged("a file of its own")
    table["stage"][0]["data"] = {"kind": "jsonl", "path": "none.jsonl"}
    with pytest.raises(RecipeError) as caught:
        parse_recipe(table)
    here = f"no such file (relative to the current directory {tmp_path})"
    assert [(problem.place, problem.rule) for problem in caught.value.problems] == [
        ("base.data.path", here),
        ("sft.data.path", here),
    ]
