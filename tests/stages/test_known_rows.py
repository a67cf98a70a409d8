"""No row that a model was trained on is a test row in silence."""

from pathlib import Path
from typing import Any

import pytest
from tiny_parts import chat_tokenizer, tiny_model, write_rows

from potstill.core.artifact import Artifact
from potstill.core.errors import UserError
from potstill.core.types import Example, Turn
from potstill.edges.models import save_model
from potstill.recipe.parse import parse_recipe
from potstill.run.runner import run_recipe
from potstill.stages.known import Noted, question_hash, question_hashes, trained_rows
from potstill.study.records import Study

TUNED = {"optim": {"steps": 1, "batch_size": 4}, "validation": {"times": 0}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("known")
    write_rows(root / "rows.jsonl", 60)
    tokenizer = chat_tokenizer()
    save_model(tiny_model("qwen2", len(tokenizer)), tokenizer, root / "base")
    return root


def data(root: Path, test: float) -> dict[str, Any]:
    return {
        "kind": "jsonl",
        "path": str(root / "rows.jsonl"),
        "context": "context",
        "splits": {"validation": 0.1, "test": test},
    }


def recipe(root: Path, *stages: dict[str, Any]) -> Any:
    prompts = {"max_tokens": 160, "max_prompt_tokens": 120}
    return parse_recipe({"name": "known", "data": data(root, 0.2), "prompts": prompts, "stage": list(stages)})


def study(ref: str, **more: Any) -> dict[str, Any]:
    rows = [{"name": "tuned", "role": "sft", "model": ref}]
    return {
        "name": "eval",
        "kind": "evaluate",
        "study": rows,
        "metrics": ["rouge_l"],
        "decoding": {"max_new_tokens": 2},
        **more,
    }


def tuned(root: Path, name: str = "tuned", **more: Any) -> dict[str, Any]:
    return {"name": name, "kind": "sft", "model": f"path:{root / 'base'}", **TUNED, **more}


def overlap(root: Path) -> int:
    first, second = (recipe(root, tuned(root, data=data(root, share))).stages[0].data for share in (0.2, 0.6))
    asked = {row.instruction for row in second.examples("test")}
    return len({row.instruction for row in first.examples("train")} & asked)


def test_other_splits_of_the_study_are_refused_before_training(root: Path, tmp_path: Path) -> None:
    told = rf"tuned was trained on {overlap(root)} of the \d+ test rows, and tuned is it .*same `data` and splits"
    with pytest.raises(UserError, match=told):
        run_recipe(recipe(root, tuned(root), study("stage:tuned", data=data(root, 0.6))), tmp_path)
    assert not list(tmp_path.glob("artifacts/tuned*"))


def test_what_a_teacher_or_a_start_saw_is_refused_too(root: Path, tmp_path: Path) -> None:
    first = tuned(root, "first", data=data(root, 0.0))
    stages = first, tuned(root, model="stage:first"), study("stage:tuned")
    with pytest.raises(UserError, match=r"first was trained on \d+ of the \d+ test rows"):
        run_recipe(recipe(root, *stages), tmp_path)


def test_a_model_of_another_run_carries_what_it_was_trained_on(root: Path, tmp_path: Path) -> None:
    made = run_recipe(recipe(root, tuned(root)), tmp_path / "a")["tuned"]
    ref = f"path:{made.folder}"
    clean = run_recipe(recipe(root, study(ref)), tmp_path / "b")["eval"]
    assert Study.load(clean.folder).row("tuned").known_rows == 0
    stage = recipe(root, study(ref, data=data(root, 0.6)))
    found = Study.load(run_recipe(stage, tmp_path / "c")["eval"].folder).row("tuned")
    assert found.known_rows == overlap(root) > 0


def test_the_run_itself_refuses_what_its_artifacts_say(root: Path, tmp_path: Path) -> None:
    made = run_recipe(recipe(root, tuned(root)), tmp_path)["tuned"]
    wider = recipe(root, study(f"path:{made.folder}", data=data(root, 0.6)))
    with pytest.raises(UserError, match=r"eval: tuned was trained on \d+ of the \d+ test rows"):
        run_recipe(wider, tmp_path)


def test_the_artifact_lists_the_rows_that_it_learned(root: Path, tmp_path: Path) -> None:
    made: Artifact = run_recipe(recipe(root, tuned(root)), tmp_path)["tuned"]
    (stage,) = recipe(root, tuned(root)).stages
    expected = question_hashes(stage.data.examples("train"))
    assert trained_rows(made.folder).tolist() == sorted(expected.tolist())
    assert made.files is not None
    assert "trained_rows.u64" in made.files


def test_the_form_of_a_question_does_not_matter_and_its_turns_do() -> None:
    plain = Example("a", "What is it?", "x", context="A  b")
    assert question_hash(plain) == question_hash(Example("b", "a B\nwhat is it?", "y"))
    turn = (Turn("user", "Before"),)
    assert question_hash(plain) != question_hash(Example("a", "What is it?", "x", context="A b", history=turn))


def test_rows_of_weight_zero_are_not_learned(tmp_path: Path) -> None:
    noted = Noted()
    assert len(list(noted([Example("a", "q", "r", weight=0.0), Example("b", "p", "r")]))) == 2
    noted.save(tmp_path)
    assert trained_rows(tmp_path).tolist() == [question_hash(Example("b", "p", "r"))]


def test_pretraining_on_prompts_learns_no_answers(root: Path, tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "layers": 1, "intermediate_size": 32}
    base = {
        "name": "base",
        "kind": "pretrain",
        "shape": shape,
        "vocab_size": 320,
        "optim": {"steps": 1},
        "data": data(root, 0.0),
    }
    run_recipe(recipe(root, base, study("stage:base")), tmp_path)
    with pytest.raises(UserError, match=r"base was trained on \d+ of the \d+ test rows"):
        run_recipe(recipe(root, {**base, "text": "rows"}, study("stage:base")), tmp_path)
