"""The stage `grpo`: it runs from a recipe, refuses before the cost, and is planned with its answers, reference and teacher."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_parts import save_pair, write_rows
from tiny_rewards import tiny_rewards

from potstill.core.artifact import Artifact
from potstill.recipe.parse import parse_recipe
from potstill.run.runner import run_recipe

OPTIM = {"steps": 3, "batch_size": 8, "lr": 1e-3}


@pytest.fixture(scope="module", autouse=True)
def kinds() -> Iterator[None]:
    with tiny_rewards():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    save_pair(folder)
    write_rows(folder / "rows.jsonl")
    return folder


def table(root: Path, **fields: Any) -> dict[str, Any]:
    stage = {"name": "it", "kind": "grpo", "model": f"path:{root}/student", "rewards": ["vowels", "overlap"], "probe_rows": 0}
    more = {"optim": OPTIM, "samples": {"per_prompt": 4, "max_new_tokens": 8, "updates": 2}, "validation": {"times": 0}}
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


WAYS = {
    "recommended": {"policy": {"cut": "counted"}},
    "paper": {"policy": "paper"},
    "deepseek": {"policy": "deepseek", "adapter": {}},
    "dr_grpo": {"policy": "dr_grpo"},
    "dapo": {"policy": {"preset": "dapo", "cut": "counted"}},
    "gspo": {"policy": {"ratio": "sequence_mean", "eps_low": 3e-4, "eps_high": 4e-4, "cut": "counted"}},
}


@pytest.mark.parametrize("name", WAYS)
def test_it_trains(name: str, root: Path, tmp_path: Path) -> None:
    made = run(root, tmp_path, **WAYS[name])
    steps = [line for line in figures(made) if "loss" in line]
    print(json.dumps(steps, indent=1), made.summary)
    assert [line["samples_age"] for line in steps] == [0, 1, 0]
