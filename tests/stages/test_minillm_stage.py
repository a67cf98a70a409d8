"""The stage `minillm`: it runs from a recipe, refuses before the cost, and is planned with its teacher and its answers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny_parts import chat_tokenizer, tiny_model, write_rows

from potstill.core.artifact import Artifact
from potstill.core.errors import UserError
from potstill.edges.models import save_model
from potstill.recipe.parse import parse_recipe
from potstill.run.runner import run_recipe
from potstill.stages.outlook import Outlook

PADDING = 64  # rows of the student's output layer that are no tokens
OPTIM = {"steps": 3, "batch_size": 4, "lr": 1e-3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    tokenizer = chat_tokenizer(320)
    for name, width, more, seed in (("student", 16, PADDING, 1), ("teacher", 32, 0, 2)):
        save_model(tiny_model("qwen2", len(tokenizer) + more, width=width, seed=seed), tokenizer, folder / name)
    write_rows(folder / "rows.jsonl")
    return folder


def recipe(root: Path, **fields: Any) -> Any:
    stage = {"name": "it", "kind": "minillm", "student": f"path:{root}/student", "teacher": f"path:{root}/teacher"}
    more = {"optim": OPTIM, "samples": {"max_new_tokens": 8, "updates": 2}, "validation": {"times": 0}}
    return parse_recipe(
        {
            "name": "one",
            "data": {"kind": "jsonl", "path": str(root / "rows.jsonl"), "splits": {"validation": 0.2, "test": 0.3}},
            "prompts": {"max_tokens": 128, "max_prompt_tokens": 96},
            "stage": [stage | more | fields],
        }
    )


def run(root: Path, folder: Path, **fields: Any) -> Artifact:
    (made,) = run_recipe(recipe(root, **fields), folder).values()
    return made


def figures(made: Artifact) -> list[dict[str, float]]:
    return [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_it_trains_on_tokens_that_both_know(alpha: float, root: Path, tmp_path: Path) -> None:
    """A sixth of the student's output layer is no token of anybody's: whoever drew one could not look it up."""
    metrics = {"times": 1, "rows": 4, "max_new_tokens": 4, "metrics": ["nll", "kl_to_teacher", "reverse_kl_on_answers"]}
    made = run(root, tmp_path, estimator={"alpha": alpha}, validation=metrics)
    steps = [line for line in figures(made) if "loss" in line]
    assert [line["samples_age"] for line in steps] == [0, 1, 0]
    names = ("reward", "reverse_kl", "length", "cut", "importance", "effective_share", "clipped", "gap")
    assert all(math.isfinite(line[f"samples_{name}"]) for line in steps for name in names)
    assert all(line["samples_gap"] < 1e-4 for line in steps)
    validated = [line for line in figures(made) if "validation_kl_to_teacher" in line]
    assert [line["step"] for line in validated] == [0, 3]
    assert made.summary["trained"]["teacher"] == f"path:{root}/teacher"
    drawn = round(sum(line["samples_length"] * 4 for line in (steps[0], steps[2])))
    assert made.summary["generated_tokens"] == made.summary["trained"]["generated_tokens"] == drawn > 0
    assert made.summary["signal"] == {"kept": "live"}


def test_what_distill_samples_are_tokens_that_both_know(root: Path, tmp_path: Path) -> None:
    samples = {"max_new_tokens": 8, "max_gap": 100.0}
    made = run(root, tmp_path, kind="distill", samples=samples)
    assert made.summary["generated_tokens"] == made.summary["sampled_tokens"] > 0


WRONG = {
    "groups": ({"samples": {"per_prompt": 3}}, "optim.batch_size = 4 answers, which per_prompt = 3 does not divide"),
    "positions": ({"samples": {"max_new_tokens": 250}}, "it.samples.max_new_tokens"),
    "clip": ({"estimator": {"clip": 1.5}}, "it.estimator.clip"),
    "a field of distill": ({"divergence": "reverse_kl"}, "it.divergence"),
    "no such teacher": ({"teacher": "path:/nowhere"}, "it.teacher"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused_before_it_runs(name: str, root: Path, tmp_path: Path) -> None:
    fields, told = WRONG[name]
    with pytest.raises(UserError) as error:
        run(root, tmp_path, **fields)
    assert told in str(error.value)
    assert not list((tmp_path / "artifacts").glob("[!.]*")) if (tmp_path / "artifacts").exists() else True


def test_the_plan_counts_teacher_answers_and_text(root: Path) -> None:
    def cost(**fields: Any) -> Any:
        (stage,) = recipe(root, **fields).stages
        return stage.cost(Outlook())

    plain = cost()
    assert cost(text=0.0).tokens == pytest.approx(plain.tokens / 2, abs=1)
    assert cost(estimator={"alpha": 0.0}).flops < plain.flops
    assert cost(samples={"max_new_tokens": 8, "updates": 1}).flops > plain.flops
    assert plain.step.teacher is not None
    steps = {"epochs": 2.0, "batch_size": 4}
    assert cost(optim=steps).steps == run_steps(root, steps)


def run_steps(root: Path, optim: dict[str, Any]) -> int:
    """Steps that two epochs take: rounds of 4 prompts and 2 · 4 rows of text."""
    (stage,) = recipe(root, optim=optim).stages
    rows = len(list(stage.data.examples("train")))
    return 2 * math.ceil(2 * rows / 12)
