"""The stage `minillm`: it runs from a recipe, refuses before the cost, and is planned with its teacher and its answers."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_parts import chat_tokenizer, tiny_model, write_rows

from potstill.core.artifact import Artifact, file_hash
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


def table(root: Path, **fields: Any) -> dict[str, Any]:
    stage = {"name": "it", "kind": "minillm", "student": f"path:{root}/student", "teacher": f"path:{root}/teacher"}
    more = {"optim": OPTIM, "samples": {"max_new_tokens": 8, "updates": 2}, "validation": {"times": 0}}
    return {
        "name": "one",
        "data": {"kind": "jsonl", "path": str(root / "rows.jsonl"), "splits": {"validation": 0.2, "test": 0.3}},
        "prompts": {"max_tokens": 128, "max_prompt_tokens": 96},
        "checkpoint": {"every_steps": 2},
        "stage": [stage | more | fields],
    }


def recipe(root: Path, **fields: Any) -> Any:
    return parse_recipe(table(root, **fields))


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


KILLED = """
import json, os, signal, sys, torch
torch.set_num_threads(1)
from potstill.losses.minillm import MiniLLM
from potstill.recipe.parse import parse_recipe
from potstill.rollouts.mixed import Mixed
from potstill.run.runner import run_recipe
from potstill.train.rounds import Rounds

def run_until(step, dying, name):
    step_of, work, at, calls = Rounds.__call__, getattr(dying, name), [-1], [0]
    def began(self, step):
        at[0], calls[0] = step, 0
        return step_of(self, step)
    def killed(self, *args):
        calls[0] += at[0] == step
        if calls[0] == 2:  # in the middle: one micro-batch has its gradient, or one token is drawn
            os.kill(os.getpid(), signal.SIGKILL)
        return work(self, *args)
    Rounds.__call__ = began
    setattr(dying, name, killed)
    run_recipe(parse_recipe(json.loads(sys.argv[1])), sys.argv[2])

WRITING, LEARNING = (Mixed, "mixture"), (MiniLLM, "__call__")
for step, what in (2, LEARNING), (3, WRITING), (5, LEARNING), (6, WRITING):
    child = os.fork()
    if child == 0:
        run_until(step, *what)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, (step, what)
"""


def test_killed_in_writing_and_in_updates_it_ends_the_same(root: Path, tmp_path: Path) -> None:
    """Rounds of 3 updates, a checkpoint after every second one: some kills find the round in it, some draw it again."""
    optim: dict[str, Any] = {**OPTIM, "steps": 7}
    fields: dict[str, Any] = {
        "optim": optim,
        "samples": {"max_new_tokens": 8, "updates": 3},
        "validation": {"times": 2, "rows": 4, "max_new_tokens": 4},
    }
    argv = [sys.executable, "-c", KILLED, json.dumps(table(root, **fields)), str(tmp_path / "killed")]
    subprocess.run(argv, check=True, capture_output=True)
    (work,) = (tmp_path / "killed" / "artifacts").glob(".work-it-*")
    assert sorted(path.name for path in (work / "checkpoints").iterdir())[-1].endswith("6")
    killed, whole = (run(root, tmp_path / name, **fields) for name in ("killed", "whole"))
    assert [line["step"] for line in figures(whole) if "loss" in line] == [*range(1, 8)]
    for name in ("model.safetensors", "metrics.jsonl"):
        assert file_hash(killed.folder / name) == file_hash(whole.folder / name), name
    counted = ("generated_tokens", "sampled_tokens", "response_tokens", "tokens")
    assert {name: killed.summary[name] for name in counted} == {name: whole.summary[name] for name in counted}


def test_what_distill_samples_are_tokens_that_both_know(root: Path, tmp_path: Path) -> None:
    made = run(root, tmp_path, kind="distill", samples={"max_new_tokens": 8, "max_gap": 1e-4})
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

    plain, own = cost(), cost(text=0.0).tokens
    (stage,) = recipe(root).stages
    text = plain.steps * stage.optim.batch_size * plain.rows[0].tokens
    assert plain.tokens == pytest.approx(own + text, abs=1)
    assert own < text  # an answer has at most max_new_tokens, and the rows' responses have more
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
