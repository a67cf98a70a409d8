"""A teacher per seed: each student is held against its own, each teacher is loaded once, and none where nothing is left."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_parts import chat_tokenizer, tiny_model, write_rows

from potstill.core.artifact import Artifact
from potstill.core.errors import Interrupted
from potstill.edges.models import save_model
from potstill.recipe.parse import parse_recipe
from potstill.run.runner import run_recipe
from potstill.stages import evaluate, measure
from potstill.stages.base import Context
from potstill.stages.evaluate import Evaluate, teacher_of
from potstill.stages.lineage import Place
from potstill.study.controls import equal_tokens, trained_apart
from potstill.study.records import Study
from potstill.train.work import Work

SEEDS = [1, 2]


def place(where: str, seed: int | None = None) -> Place:
    found = Place(where, None)
    found.seed = seed
    return found


def test_the_teacher_of_the_same_seed_else_the_first():
    teachers = [place("t1", 1), place("t2", 2)]
    assert [teacher_of(place("x", seed), teachers) for seed in (1, 2, 3, None)] == ["t1", "t2", "t1", "t1"]
    assert teacher_of(place("x", 2), [place("t")]) == "t"
    assert teacher_of(place("x", 2), []) == ""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("parts")
    tokenizer = chat_tokenizer()
    for name, seed in (("small", 1), ("big", 2)):
        save_model(tiny_model("qwen2", len(tokenizer), eos=tokenizer.eos_token_id, seed=seed), tokenizer, folder / name)
    small, big = (f"path:{folder / name}" for name in ("small", "big"))
    tuned = {"optim": {"steps": 4, "batch_size": 8, "lr": 3e-3}, "validation": {"times": 0}, "per_seed": True}
    study = [
        {"name": "KD", "role": "kd", "model": "stage:kd"},
        {"name": "SFT", "role": "sft", "model": "stage:sft"},
        {"name": "Base", "role": "base", "model": small},
        {"name": "Teacher", "role": "teacher", "model": "stage:teacher"},
    ]
    metrics = ["rouge_l", "kl_to_teacher"]
    return {
        "name": "teachers",
        "seeds": SEEDS,
        "data": {"kind": "jsonl", "path": str(write_rows(folder / "rows.jsonl")), "splits": {"validation": 0.1, "test": 0.2}},
        "prompts": {"max_tokens": 160, "max_prompt_tokens": 120},
        "stage": [
            {"name": "teacher", "kind": "sft", "model": big, **tuned},
            {"name": "sft", "kind": "sft", "model": small, **tuned},
            {"name": "kd", "kind": "distill", "student": small, "teacher": "stage:teacher", **tuned},
            {"name": "study", "kind": "evaluate", "study": study, "metrics": metrics, "decoding": {"max_new_tokens": 2}},
        ],
    }


@pytest.fixture(scope="module")
def ran(table: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Artifact], Counter[str]]:
    loaded: Counter[str] = Counter()
    load = evaluate.load_model

    def counting(where: str, *args: Any) -> Any:
        loaded[Path(where).name.partition("-")[0]] += 1
        return load(where, *args)

    with pytest.MonkeyPatch.context() as patch:
        for room in (evaluate, measure):
            patch.setattr(room, "load_model", counting)
        return run_recipe(parse_recipe(table), tmp_path_factory.mktemp("out")), loaded


def test_every_seed_is_held_against_its_own_teacher(ran: Any):
    study = Study.load(ran[0]["study"].folder)
    teacher = next(row for row in study.rows if row.role == "teacher")
    assert teacher.seeds == (1, 2)
    for scores in teacher.scores["kl_to_teacher"]:
        assert max(map(abs, scores)) < 1e-4  # against the first teacher alone, the second would be away from itself


def test_each_teacher_is_loaded_once_beside_its_own_row(ran: Any):
    assert ran[1] == {"kd@1": 1, "kd@2": 1, "sft@1": 1, "sft@2": 1, "small": 1, "teacher@1": 2, "teacher@2": 2}


def test_the_study_says_what_each_was_trained_with(ran: Any):
    study = Study.load(ran[0]["study"].folder)
    rows = {row.name: row.trained for row in study.rows}
    assert trained_apart(study.row("KD"), study.row("SFT")) == {}
    assert equal_tokens(study.row("KD"), study.row("SFT"))
    assert rows["Base"] is None
    assert [one.seed for one in rows["KD"]] == SEEDS
    assert rows["KD"][0].start != rows["Teacher"][0].start
    assert rows["KD"][0].lr == 3e-3
    assert rows["KD"][0].prompts == study.prompts
    assert (rows["KD"][0].teacher, rows["SFT"][0].teacher) == ("stage:teacher", None)


def test_a_study_that_was_stopped_loads_no_teacher_for_what_is_there(
    ran: Any, table: dict[str, Any], tmp_path: Path, monkeypatch
):
    done = ran[0]
    stage = next(stage for stage in parse_recipe(table).stages if isinstance(stage, Evaluate))
    inputs = {name: [done[f"{name}@{seed}"] for seed in SEEDS] for name in ("kd", "sft", "teacher")}
    left = iter([False] * 6 + [True] + [False] * 9)
    work = Work(tmp_path / "work", "study", stop_requested=lambda: next(left))
    with pytest.raises(Interrupted, match="after model 7 of 7"):
        stage.run(Context(work, inputs))
    monkeypatch.setattr(measure, "load_model", lambda *_: pytest.fail("nothing is left to measure"))
    assert stage.run(Context(work, inputs))["test_rows"] > 0
    theirs = Study.load(done["study"].folder)
    assert Study.load(work.folder).rows == theirs.rows
