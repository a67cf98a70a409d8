"""Whole chains of tiny models: what each stage leaves, what is done again, and what leaves the house."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_parts import chat_tokenizer, gpt2_tokenizer, tiny_model, write_rows

from potstill.core.artifact import Artifact, read_json
from potstill.core.types import Example
from potstill.data.exported import exported_template
from potstill.data.prompts import Prompts, Renderer
from potstill.edges.models import load_model, load_tokenizer, save_model
from potstill.recipe.parse import parse_recipe
from potstill.run.runner import run_recipe
from potstill.study.controls import equal_tokens
from potstill.study.records import Study

SEEDS = [1, 2]
HOSTILE = "<script>alert(1)</script>"
SPEED = {"kind": "decode_speed", "new_tokens": 2, "repeats": 1}
METRICS = ["rouge_l", "exact_match", "nll", "kl_to_teacher", SPEED]
SHAPE = {"hidden_size": 32, "layers": 2, "intermediate_size": 64, "positions": 256}
OPTIM = {"steps": 6, "batch_size": 8, "lr": 3e-3}
QUIET = {"times": 0}


def source(path: Path) -> dict[str, Any]:
    splits = {"validation": 0.1, "test": 0.2}
    return {
        "kind": "jsonl",
        "path": str(path),
        "context": "context",
        "language_column": "language",
        "splits": splits,
    }


def recipe(path: Path, ratio: float = 0.9) -> dict[str, Any]:
    study = [
        {"name": "Base", "role": "base", "model": "stage:small"},
        {"name": "SFT", "role": "sft", "model": "stage:sft"},
        {"name": "KD", "role": "kd", "model": "stage:kd"},
        {"name": "KD 4-bit", "role": "quantized", "model": "stage:kd4"},
        {"name": "KD rounded", "role": "rtn", "model": "stage:rtn4"},
        {"name": "Teacher", "role": "teacher", "model": "stage:teacher"},
    ]
    tuned = {"optim": OPTIM, "validation": QUIET}
    kd = {"name": "kd", "kind": "distill", "student": "stage:small", "teacher": "stage:teacher", "per_seed": True}
    return {
        "name": "chain",
        "seeds": SEEDS,
        "data": source(path),
        "prompts": {"max_tokens": 160, "max_prompt_tokens": 120},
        "stage": [
            {"name": "big", "kind": "pretrain", "shape": SHAPE | {"hidden_size": 64}, "vocab_size": 320, "optim": OPTIM},
            {"name": "small", "kind": "pretrain", "shape": SHAPE, "tokenizer": "stage:big", "optim": OPTIM},
            {"name": "teacher", "kind": "sft", "model": "stage:big", **tuned, "validation": {"times": 1, "rows": 2}},
            {"name": "sft", "kind": "sft", "model": "stage:small", "per_seed": True, **tuned},
            {**kd, "ratio": ratio, **tuned},
            {"name": "kd4", "kind": "quantize", "model": "stage:kd", "rows": 8},
            {"name": "rtn4", "kind": "quantize", "model": "stage:kd", "rows": 8, "method": "rtn"},
            {"name": "study", "kind": "evaluate", "study": study, "metrics": METRICS, "decoding": {"max_new_tokens": 6}},
            {"name": "export", "kind": "export", "model": "stage:kd4", "study": "stage:study"},
            {"name": "report", "kind": "report", "study": "stage:study", "exports": ["stage:export"]},
        ],
    }


def run(table: dict[str, Any], out: Path) -> dict[str, Artifact]:
    return run_recipe(parse_recipe(table), out, command="potstill run chain.toml")


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: Any) -> Path:
    """Sixty rows, and so many hostile ones that the report shows some."""
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")
    row = {"context": HOSTILE, "language": "en"}
    hostile = [row | {"instruction": f"{HOSTILE} {i}", "response": f"{HOSTILE} | {i}"} for i in range(90)]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in hostile)
    return path


@pytest.fixture(scope="module")
def chain(rows_file: Path, tmp_path_factory: Any) -> tuple[Path, dict[str, Artifact]]:
    out = tmp_path_factory.mktemp("chain")
    return out, run(recipe(rows_file), out)


Chain = tuple[Path, dict[str, Artifact]]
PER_SEED = [f"{name}@{seed}" for name in ("sft", "kd", "kd4", "rtn4") for seed in SEEDS]


def test_every_stage_leaves_an_artifact_and_students_one_per_seed(chain: Chain) -> None:
    out, done = chain
    assert set(done) == {"big", "small", "teacher", *PER_SEED, "study", "export", "report"}
    assert not list((out / "artifacts").glob(".*"))
    for ident, artifact in done.items():
        assert artifact.name == ident
        assert artifact.folder.name == f"{ident}-{artifact.fingerprint[:12]}"
        assert Artifact.load(artifact.folder) == artifact
        leftovers = {path.name for path in artifact.folder.iterdir()} & {"checkpoints", "tokens"}
        assert not leftovers
    assert done["kd@1"].parents == {"small": done["small"].fingerprint, "teacher": done["teacher"].fingerprint}
    assert done["kd4@2"].parents == {"kd@2": done["kd@2"].fingerprint}
    assert [done[f"sft@{seed}"].stage["seed"] for seed in SEEDS] == SEEDS


def test_students_of_different_seeds_differ(chain: Chain) -> None:
    _, done = chain
    first, second = (load_model(f"path:{done[f'kd@{seed}'].folder}") for seed in SEEDS)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_fine_tuned_and_distilled_students_learn_the_same_tokens(chain: Chain) -> None:
    _, done = chain
    for seed in SEEDS:
        sft, kd = done[f"sft@{seed}"].summary, done[f"kd@{seed}"].summary
        for key in ("response_tokens", "tokens", "rows", "steps", "epochs", "parameters", "data"):
            assert sft[key] == kd[key], key
        assert sft["data"]["end_of_turn"] == "<|im_end|>"
        assert [learned for _, learned in sft["data"]["mask_preview"]][-1] is True


def test_a_second_run_does_nothing(chain: Chain, rows_file: Path) -> None:
    out, done = chain
    before = {path: path.stat().st_mtime_ns for path in (out / "artifacts").rglob("*")}
    begun = time.monotonic()
    assert run(recipe(rows_file), out) == done
    assert time.monotonic() - begun < 2
    assert {path: path.stat().st_mtime_ns for path in (out / "artifacts").rglob("*")} == before


def test_what_changed_is_done_again_with_all_that_rests_on_it(chain: Chain, rows_file: Path) -> None:
    out, done = chain
    changed = run(recipe(rows_file, ratio=0.4), out)
    again = {ident for ident in done if changed[ident].folder != done[ident].folder}
    assert again == {"kd@1", "kd@2", "kd4@1", "kd4@2", "rtn4@1", "rtn4@2", "study", "export", "report"}
    assert all(artifact.folder.is_dir() for artifact in done.values()), "what there was stays"
    begun = time.monotonic()
    assert run(recipe(rows_file), out) == done, "and is found again"
    assert time.monotonic() - begun < 2


def test_the_study_holds_every_score_of_every_model(chain: Chain) -> None:
    _, done = chain
    study = Study.load(done["study"].folder)
    N = len(study.examples)
    assert N == done["study"].summary["test_rows"] > 5
    assert len(study.tokens) == N
    assert [row.name for row in study.rows] == ["Base", "SFT", "KD", "KD 4-bit", "KD rounded", "Teacher"]
    for row in study.rows:
        trained = row.role not in ("base", "teacher")
        assert row.seeds == ((1, 2) if trained else row.seeds)
        assert len(row.seeds) == (2 if trained else 1)
        assert set(row.scores) == {"rouge_l", "exact_match", "nll", "kl_to_teacher"}
        for scores in row.scores.values():
            assert [len(per_seed) for per_seed in scores] == [N] * len(row.seeds)
        assert row.decode_tokens_per_s > 0
    by_role = {row.role: row for row in study.rows}
    assert equal_tokens(by_role["sft"], by_role["kd"])
    assert by_role["quantized"].source == "KD"
    assert max(abs(score) for score in by_role["teacher"].scores["kl_to_teacher"][0]) < 1e-4
    assert min(min(scores) for scores in by_role["kd"].scores["kl_to_teacher"]) > 0
    assert by_role["quantized"].bytes < by_role["kd"].bytes


def test_answers_are_complete_and_in_the_order_of_the_study(chain: Chain) -> None:
    _, done = chain
    study = Study.load(done["study"].folder)
    lines = [json.loads(line) for line in (done["study"].folder / "answers.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [example.key for example in study.examples]
    for line in lines:
        assert {name: len(texts) for name, texts in line["answers"].items()} == {r.name: len(r.seeds) for r in study.rows}


def test_test_rows_were_in_no_training(chain: Chain, rows_file: Path) -> None:
    from potstill.sources import Source

    data: Any = Source.parse(source(rows_file))
    tested = {example.instruction for example in data.examples("test")}
    assert not tested & {example.instruction for split in ("train", "validation") for example in data.examples(split)}
    study = Study.load(chain[1]["study"].folder)
    assert len(study.examples) == len(tested)


def test_the_report_has_the_documented_keys(chain: Chain) -> None:
    out, done = chain
    report = read_json(done["report"].folder / "report.json")
    assert read_json(out / "report.json") == report
    for row in report["rows"]:
        assert row["parameters"] > 0
        assert row["bytes"] > 0
        low, high = row["metrics"]["rouge_l"]["ci"]
        assert low <= row["metrics"]["rouge_l"]["value"] <= high
        if row["role"] in ("sft", "kd"):
            assert row["response_tokens"] > 0
    for verdict in report["verdicts"]:
        assert {"question", "difference", "ci", "verdict"} <= verdict.keys()
    assert report["provenance"]["command"] == "potstill run chain.toml"
    assert report["provenance"]["seeds"] == SEEDS
    assert set(report["provenance"]["fingerprints"]) == set(done) - {"export", "report", "study"}
    assert {curve["name"] for curve in report["curves"]} == {"SFT", "KD", "Teacher"}
    assert {entry["method"] for entry in report["quantization"]} == {"gptq", "rtn"}


def test_hostile_text_is_shown_and_not_run(chain: Chain) -> None:
    out, done = chain
    study = Study.load(done["study"].folder)
    assert any(HOSTILE in example.prompt for example in study.examples)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page, [e.prompt for e in study.examples]


def test_a_hostile_answer_is_shown_and_not_run(chain: Chain, tmp_path: Path) -> None:
    import shutil

    import potstill as ps

    made = chain[1]["study"]
    copied = shutil.copytree(made.folder, tmp_path / "copied")
    (copied / "artifact.json").unlink()
    lines = [json.loads(line) for line in (copied / "answers.jsonl").read_text().splitlines()]
    answer = "<img src=x onerror=alert(2)>"
    for line in lines:
        line["answers"] = {name: [answer] * len(texts) for name, texts in line["answers"].items()}
    (copied / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    study = replace(made, folder=tmp_path / "study").commit(copied)
    report = ps.run_stage(ps.Report.model_validate({"study": study}), tmp_path / "report")
    page = (report.folder / "report.html").read_text(encoding="utf-8")
    assert answer not in page
    assert "&lt;img src=x onerror=alert(2)&gt;" in page


def answer_of(model: Any, tokenizer: Any, prompts: Prompts) -> list[int]:
    """Greedy, by plain transformers."""
    asked = Renderer(tokenizer, prompts).prompt(Example("k", "Say peat and tun, number 3.", "r")).ids
    ids_BT = torch.tensor([asked])
    pad_id = tokenizer.pad_token_id
    out_BT = model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        min_new_tokens=8,
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=pad_id,
    )
    return out_BT[0].tolist()


def assert_leaves_unchanged(folder: Path, model_folder: Path, prompts: Prompts) -> None:
    """Plain transformers loads the export, which answers as the artifact does; GGUF holds every tensor."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    ours = load_model(f"path:{model_folder}")
    state = ours.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    assert tokenizer.chat_template == exported_template(load_tokenizer(f"path:{model_folder}"), prompts)
    assert answer_of(theirs, tokenizer, prompts) == answer_of(ours, load_tokenizer(f"path:{model_folder}"), prompts)
    reader = gguf.GGUFReader(folder / "model-q4_0.gguf")
    assert sum(int(tensor.n_elements) for tensor in reader.tensors) == sum(p.numel() for p in ours.parameters())
    assert not (folder / "model-f16.gguf").exists()


def test_the_export_is_the_first_seeds_model_and_opens_elsewhere(chain: Chain) -> None:
    _, done = chain
    folder = done["export"].folder
    assert_leaves_unchanged(folder, done["kd4@1"].folder, Prompts(max_tokens=160, max_prompt_tokens=120))
    assert set(done["export"].summary["files"]) <= {str(path.relative_to(folder)) for path in folder.rglob("*")}
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert "| **KD 4-bit** |" in card
    assert "| Teacher |" in card
    assert HOSTILE not in card
    assert "llama-cli -m model-q4_0.gguf -cnv" in card


def test_the_report_names_the_files_that_were_exported(chain: Chain) -> None:
    _, done = chain
    report = read_json(done["report"].folder / "report.json")
    assert done["report"].parents["export"] == done["export"].fingerprint
    files = {
        path.name: path.stat().st_size for path in done["export"].folder.iterdir() if path.suffix in (".gguf", ".safetensors")
    }
    shipped = {row["name"]: row for row in report["rows"]}["KD 4-bit"]
    assert {file["name"]: file["bytes"] for file in shipped["files"]} == files
    assert [Path(file["path"]).is_file() for file in shipped["files"]] == [True] * len(files)
    assert shipped["size"] == {"bytes": files["model-q4_0.gguf"], "of": "model-q4_0.gguf"}
    assert {row["size"]["of"] for row in report["rows"] if row["name"] != "KD 4-bit"} == {"not exported"}


def saved(folder: Path, family: str, tokenizer: Any, **more: Any) -> str:
    model = tiny_model(family, len(tokenizer), eos=tokenizer.eos_token_id, **more)
    save_model(model, tokenizer, folder)
    return f"path:{folder}"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_chain_of_models_that_come_from_elsewhere(family: str, rows_file: Path, tmp_path: Path) -> None:
    tokenizer = gpt2_tokenizer() if family == "gpt2" else chat_tokenizer()
    small = saved(tmp_path / "small", family, tokenizer, seed=1)
    big = saved(tmp_path / "big", family, tokenizer, seed=2, width=64)
    prompts = {"format": "alpaca" if family == "gpt2" else "chat", "max_tokens": 250, "max_prompt_tokens": 200}
    tuned = {"optim": OPTIM, "validation": QUIET}
    study = [
        {"name": "KD", "role": "kd", "model": "stage:kd"},
        {"name": "Teacher", "role": "teacher", "model": "stage:teacher"},
    ]
    table = {
        "name": "family",
        "data": source(rows_file),
        "prompts": prompts,
        "stage": [
            {"name": "teacher", "kind": "sft", "model": big, **tuned},
            {"name": "kd", "kind": "distill", "student": small, "teacher": "stage:teacher", **tuned},
            {"name": "kd4", "kind": "quantize", "model": "stage:kd", "rows": 4},
            {"name": "study", "kind": "evaluate", "study": study, "metrics": METRICS, "decoding": {"max_new_tokens": 3}},
            {"name": "export", "kind": "export", "model": "stage:kd4"},
        ],
    }
    done = run(table, tmp_path / "out")
    kept = done["kd4"].summary["kept"]
    assert kept == []
    assert_leaves_unchanged(done["export"].folder, done["kd4"].folder, Prompts(**prompts))
    assert Study.load(done["study"].folder).rows[0].trained[0].response_tokens == done["kd"].summary["response_tokens"]


def test_stages_run_from_python_without_a_recipe(rows_file: Path, tmp_path: Path) -> None:
    import potstill as ps

    tokenizer = chat_tokenizer()
    small = saved(tmp_path / "small", "qwen2", tokenizer, seed=1)
    big = saved(tmp_path / "big", "qwen2", tokenizer, seed=2, width=64)
    data, prompts = ps.Source.parse(source(rows_file)), ps.Prompts(max_tokens=160, max_prompt_tokens=120)
    common: dict[str, Any] = {
        "data": data,
        "prompts": prompts,
        "optim": ps.Optim(**OPTIM),
        "validation": ps.Validation(times=0),
    }
    teacher = ps.run_stage(ps.SFT(model=big, **common), tmp_path / "teacher")
    sft = ps.run_stage(ps.SFT(model=small, **common), tmp_path / "sft")
    kd = ps.run_stage(ps.Distill(student=small, teacher=teacher, ratio=0.9, **common), tmp_path / "kd")
    kd4 = ps.run_stage(ps.Quantize(model=kd, data=data, prompts=prompts, rows=4), tmp_path / "kd4")
    rows = (
        ps.Row(name="SFT", role="sft", model=sft),
        ps.Row(name="KD", role="kd", model=kd),
        ps.Row(name="KD 4-bit", role="quantized", model=kd4),
        ps.Row(name="Teacher", role="teacher", model=teacher),
    )
    metrics = tuple(ps.Metric.parse(metric) for metric in METRICS)
    decoding = ps.Decoding(max_new_tokens=4)
    evaluate = ps.Evaluate(study=rows, data=data, prompts=prompts, metrics=metrics, decoding=decoding)
    evaluation = ps.run_stage(evaluate, tmp_path / "study")
    report = ps.run_stage(ps.Report(study=evaluation), tmp_path / "report")
    export = ps.run_stage(ps.Export(model=kd4, study=evaluation), tmp_path / "export")
    assert sft.summary["response_tokens"] == kd.summary["response_tokens"]
    assert read_json(report.folder / "report.json")["headline"]["sentence"]
    assert "| **KD 4-bit** |" in (export.folder / "README.md").read_text(encoding="utf-8")
    again = ps.run_stage(ps.Distill(student=small, teacher=teacher, ratio=0.9, **common), tmp_path / "kd")
    assert again == kd
    with pytest.raises(ps.UserError, match="holds another artifact"):
        ps.run_stage(ps.Distill(student=small, teacher=teacher, ratio=0.8, **common), tmp_path / "kd")
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert not left
