"""What a tiny run gives, written down: when it changes for equal fields, artifacts made before are of other numbers.

A failure here means one of two things. Either a change was not meant to touch numbers, and is wrong. Or it was: then raise
`CODE` in run/fingerprints.py (or the component's own `version`), so that older artifacts are made again, and pin the new ones.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_parts import chat_tokenizer, tiny_model, write_rows

import potstill
from potstill.core.artifact import fingerprint
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, instruction_pairs
from potstill.edges.models import save_model
from potstill.run.fingerprints import CODE, Fingerprints
from potstill.run.folder import leftovers
from potstill.run.graph import in_use, plan

PROMPTS = {"max_tokens": 128, "max_prompt_tokens": 96}
PINNED = {
    "code": 11,
    "tokens": "c008ddcd4ebb333c",
    "sft": [6.07683861773947, 5.9748193359375, 5.89641357421875, 5.970550173804874, 5.741383292458274],
    "kd": [3.278742251188859, 3.222972412109375, 3.18422119140625, 3.2236509777250744, 3.098946311257102],
    "quantised": [0.0036489097140422295, 0.003481368551466366, 0.003271961993315996, 0.002890030981898628],
}
AGAIN = "numbers changed for equal fields: raise run/fingerprints.CODE and pin again"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Tokens and order of rows exactly; losses and errors as processors round them."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("pinned")
    tokenizer = chat_tokenizer()
    for name, width, seed in (("teacher", 64, 1), ("student", 32, 2)):
        save_model(tiny_model("qwen2", len(tokenizer), width=width, seed=seed), tokenizer, root / name)
    data = potstill.Jsonl(path=str(write_rows(root / "rows.jsonl")), language_column="language")
    prompts = Prompts(**PROMPTS)
    rows = {
        split: list(instruction_pairs(data.examples(split), Renderer(tokenizer, prompts), Counts()))
        for split in ("train", "validation", "test")
    }
    common = {"data": data, "prompts": prompts, "optim": {"steps": 5, "batch_size": 8, "lr": 1e-3, "precision": "fp32"}}
    common["validation"] = {"times": 0}
    student = f"path:{root / 'student'}"
    sft = potstill.run_stage(potstill.SFT(model=student, **common), root / "sft")
    kd = potstill.run_stage(potstill.Distill(student=student, teacher=f"path:{root / 'teacher'}", **common), root / "kd")
    quantize = potstill.Quantize(model=kd, data=data, prompts=prompts, rows=8)
    quantised = potstill.run_stage(quantize, root / "q4").summary["layers"]
    return {
        "code": CODE,
        "tokens": fingerprint(rows)[:16],
        "sft": losses(sft.folder),
        "kd": losses(kd.folder),
        "quantised": [layer["gptq_error"] for layer in quantised[:4]],
    }


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_splits_order_and_tokens_are_as_they_were(found: dict[str, object]) -> None:
    assert (found["code"], found["tokens"]) == (PINNED["code"], PINNED["tokens"]), AGAIN


@pytest.mark.parametrize("what", ["sft", "kd", "quantised"])
def test_numbers_are_as_they_were(found: dict[str, object], what: str) -> None:
    tolerance = 1e-4 if what != "quantised" else 1e-2  # codes may differ by one where a processor rounds otherwise
    assert found[what] == pytest.approx(PINNED[what], rel=tolerance), AGAIN


def test_auto_is_the_precision_that_this_machine_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tiny_model("qwen2", len(chat_tokenizer())), chat_tokenizer(), tmp_path / "model")
    data = potstill.Jsonl(path=str(write_rows(tmp_path / "rows.jsonl")))

    def digest(precision: Any) -> str:
        stage = potstill.SFT(model=f"path:{tmp_path / 'model'}", data=data, optim=potstill.Optim(steps=1, precision=precision))
        return Fingerprints(tmp_path).of(stage, {})

    wide, narrow = digest("fp32"), digest("bf16")
    assert wide != narrow
    assert digest("auto") in (wide, narrow)
    for in_bf16, same in ((True, narrow), (False, wide)):
        monkeypatch.setattr("potstill.run.fingerprints.in_bf16", lambda _, answer=in_bf16: answer)
        assert digest("auto") == same


def test_what_a_machine_of_the_other_precision_made_is_no_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tiny_model("qwen2", len(chat_tokenizer())), chat_tokenizer(), tmp_path / "model")
    sft = {
        "name": "sft",
        "kind": "sft",
        "model": f"path:{tmp_path / 'model'}",
        "optim": {"steps": 1},
        "validation": {"times": 0},
    }
    tuned = {**sft, "name": "more", "model": "stage:sft"}
    data = {"kind": "jsonl", "path": str(write_rows(tmp_path / "rows.jsonl"))}
    recipe = potstill.parse_recipe({"name": "two", "data": data, "prompts": PROMPTS, "stage": [sft, tuned]})
    out = tmp_path / "run"
    made = potstill.run_recipe(recipe, out)
    monkeypatch.setattr("potstill.run.fingerprints.in_bf16", lambda _: True)
    monkeypatch.setattr("potstill.run.graph.in_bf16", lambda _: True)
    planned = plan(recipe, out)
    assert [item.done for item in planned] == [False, False]
    assert {item.elsewhere for item in planned} == {artifact.folder for artifact in made.values()}
    assert leftovers(out, in_use(planned)) == []
