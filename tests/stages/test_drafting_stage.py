"""A student as its teacher's draft model, as columns of a study and of its report."""

import json
from pathlib import Path

import pytest
import torch
from tiny_parts import chat_tokenizer, tiny_model, write_rows

import potstill
from potstill.edges.models import save_model

METRICS = (
    "nll",
    "acceptance",
    {"kind": "draft_acceptance", "rows": 3, "new_tokens": 12},
    {"kind": "speculative", "rows": 3, "new_tokens": 12},
)


def test_it_is_measured_of_the_students_alone_on_the_first_rows(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    for name, seed, layers in (("student", 1, 1), ("teacher", 2, 2)):
        model = tiny_model("qwen2", len(tokenizer), seed=seed, eos=tokenizer.eos_token_id, num_hidden_layers=layers)
        save_model(model, tokenizer, tmp_path / name)
    study = (
        potstill.Row(name="KD", role="kd", model=f"path:{tmp_path / 'student'}"),
        potstill.Row(name="Teacher", role="teacher", model=f"path:{tmp_path / 'teacher'}"),
    )
    data = potstill.Jsonl(path=str(write_rows(tmp_path / "rows.jsonl")), splits={"validation": 0.2, "test": 0.5})
    prompts = potstill.Prompts(max_tokens=250, max_prompt_tokens=200)
    decoding = potstill.Decoding(max_new_tokens=4)
    stage = potstill.Evaluate(
        study=study, metrics=METRICS, primary="nll", data=data, prompts=prompts, rows=12, decoding=decoding
    )
    torch.manual_seed(0)
    made = potstill.run_stage(stage, into=tmp_path / "study")
    rows = {row["name"]: row["scores"] for row in json.loads((made.folder / "study.json").read_text())["rows"]}
    (accepted,), (speed,) = rows["KD"]["draft_acceptance"], rows["KD"]["speculative"]
    assert sum(score is not None for score in accepted) == sum(score is not None for score in speed) == 3
    assert 0 <= sum(accepted[:3]) <= 300
    assert sum(speed[:3]) > 0
    assert "speculative" not in rows["Teacher"]
    page = potstill.run_stage(potstill.Report(study=made), into=tmp_path / "report")
    report = json.loads((page.folder / "report.json").read_text())
    figures = {row["name"]: row["metrics"] for row in report["rows"]}
    assert figures["KD"]["speculative"]["value"] == pytest.approx(sum(speed[:3]) / 3)
    assert figures["Teacher"]["acceptance"]["value"] == pytest.approx(100, abs=1e-3)
