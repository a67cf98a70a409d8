"""The model that a stage saves is the one that its last validation measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_parts import chat_tokenizer, tiny_model, write_rows

import potstill
from potstill.edges.models import save_model, stored_dtype

LR = 2e-5  # a step moves a weight by less than bf16 tells apart at 0.02 and above


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = chat_tokenizer()
    save_model(tiny_model("qwen2", len(tokenizer)).to(torch.bfloat16), tokenizer, folder / "model")
    write_rows(folder / "rows.jsonl")
    return folder


def sft(model: str, base: Path, **fields: Any) -> potstill.SFT:
    data = potstill.Jsonl(path=str(base / "rows.jsonl"), splits={"validation": 0.3, "test": 0.2})
    optim = {"steps": 2, "batch_size": 4, "lr": LR, "schedule": "constant"}
    return potstill.SFT(model=model, data=data, optim=optim, validation={"times": 1, "metrics": ["nll"]}, **fields)


def validated(artifact: potstill.Artifact) -> list[float]:
    lines = map(json.loads, (artifact.folder / "metrics.jsonl").read_text().splitlines())
    return [line["validation_nll"] for line in lines if "validation_nll" in line]


@pytest.mark.parametrize("save_dtype", ["auto", "bf16"])
def test_the_next_stage_starts_from_what_was_measured(save_dtype: str, base: Path, tmp_path: Path) -> None:
    first = potstill.run_stage(sft(f"path:{base / 'model'}", base, save_dtype=save_dtype), into=tmp_path / "first")
    second = potstill.run_stage(sft(f"path:{first.folder}", base), into=tmp_path / "second")
    began, ended = validated(first)
    assert began != ended
    exact = validated(second)[0] == ended
    assert exact == (save_dtype == "auto")  # bf16 rounds what was learned away
    assert stored_dtype(f"path:{first.folder}") == (torch.float32 if save_dtype == "auto" else torch.bfloat16)


@pytest.mark.parametrize("rest", ["auto", "fp32", "bf16", "fp16"])
def test_what_is_not_quantised_has_the_dtype_that_is_named(rest: str, base: Path, tmp_path: Path) -> None:
    """Left to itself a float32 model keeps what bf16 would round."""
    torch.manual_seed(1)
    tokenizer = chat_tokenizer()
    model = tiny_model("qwen2", len(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(parameter.bfloat16())  # norms that it holds exactly
    save_model(model, tokenizer, tmp_path / "model")
    data = potstill.Jsonl(path=str(base / "rows.jsonl"), splits={"validation": 0.3, "test": 0.2})
    stage = potstill.Quantize(model=f"path:{tmp_path / 'model'}", data=data, rows=2, method="rtn", rest=rest)
    made = potstill.run_stage(stage, into=tmp_path / "four")
    with safe_open(str(made.folder / "model.safetensors"), "pt") as file:
        table, norm = (file.get_tensor(name).dtype for name in ("model.embed_tokens.weight", "model.norm.weight"))
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert table == named.get(rest, torch.float32)
    assert norm == named.get(rest, torch.bfloat16)
