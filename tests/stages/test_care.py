"""What a stage does so that nobody is surprised hours later, or in another program."""

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tiny_parts import chat_tokenizer, tiny_model, write_rows
from transformers import AutoModelForCausalLM, GenerationConfig

import potstill
from potstill.core.errors import UserError
from potstill.edges.models import save_model
from potstill.recipe.parse import parse_recipe
from potstill.run.fingerprints import Fingerprints
from potstill.run.runner import run_recipe

QUIET = potstill.Validation(times=0)
PROMPTS = potstill.Prompts(max_tokens=250, max_prompt_tokens=200)


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Path:
    """A base whose end of sequence is not its end of turn, and which brings sampling along, as Qwen2.5's do."""
    tokenizer = chat_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    model = tiny_model("qwen2", len(tokenizer), eos=tokenizer.eos_token_id)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, do_sample=True, temperature=0.7, top_k=20)
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: Any) -> potstill.Artifact:
    folder = tmp_path_factory.mktemp("tuned")
    data = potstill.Jsonl(path=str(write_rows(folder / "rows.jsonl")))
    stage = potstill.SFT(
        model=f"path:{base}", data=data, prompts=PROMPTS, optim=potstill.Optim(steps=2, batch_size=4), validation=QUIET
    )
    return potstill.run_stage(stage, into=folder / "tuned")


def test_a_tuned_model_stops_at_the_end_of_turn_in_any_program(tuned: potstill.Artifact, tmp_path: Path) -> None:
    exported = potstill.run_stage(potstill.Export(model=tuned), into=tmp_path / "export")
    tokenizer = potstill.load_tokenizer(f"path:{exported.folder}")
    turn, end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    generation = AutoModelForCausalLM.from_pretrained(exported.folder).generation_config
    assert generation.eos_token_id == [turn, end]
    assert not generation.do_sample
    assert generation.temperature in (None, 1.0)
    fields = GGUFReader(exported.folder / "model-f16.gguf").fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == turn
    assert fields["tokenizer.ggml.eos_token_id"].contents() == end


def test_an_export_that_was_killed_is_written_anew_and_listed_whole(tuned: potstill.Artifact, tmp_path: Path) -> None:
    stage = potstill.Export(model=tuned, name="export")
    left = tmp_path / f".work-export-{Fingerprints(tmp_path).of(stage, {})[:12]}"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"torn")
    (left / "of-an-older-run.txt").write_text("old")
    exported = potstill.run_stage(stage, into=tmp_path / "export")
    assert {"config.json", "model.safetensors", "model-f16.gguf", "tokenizer.json"} <= set(exported.summary["files"])
    assert not (exported.folder / "of-an-older-run.txt").exists()


def test_an_empty_split_is_refused_before_the_first_stage_runs(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    table = {
        "name": "early",
        "data": {"kind": "jsonl", "path": str(rows), "splits": {"validation": 0.1, "test": 0.0}},
        "prompts": PROMPTS.model_dump(),
        "stage": [
            {"name": "sft", "kind": "sft", "model": f"path:{base}", "optim": {"steps": 1}},
            {"name": "study", "kind": "evaluate", "study": [{"name": "SFT", "model": "stage:sft"}], "metrics": ["rouge_l"]},
        ],
    }
    wanted = "recipe: 1 problem\n  study.data  the test split is empty; give it more rows, or set data.splits"
    with pytest.raises(UserError) as error:
        run_recipe(parse_recipe(table), tmp_path / "out")
    assert str(error.value) == wanted
    assert list((tmp_path / "out" / "artifacts").iterdir()) == []
