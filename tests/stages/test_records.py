"""What an evaluation found out beside its scores stands in the study, and its report says it."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_parts import WORDS, chat_tokenizer, rows, tiny_model

from potstill.core.artifact import fingerprint
from potstill.core.errors import UserError
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, instruction_pairs
from potstill.edges.models import load_model, load_tokenizer, save_model
from potstill.edges.sampling import generate
from potstill.recipe.parse import parse_recipe
from potstill.run.reports import report_of
from potstill.run.runner import run_recipe
from potstill.stages.outlook import Outlook
from potstill.stages.study_record import unfit
from potstill.study.analysis import analyse
from potstill.study.records import Study

TIGHT = {"max_tokens": 60, "max_prompt_tokens": 44}
QUIET = {"optim": {"steps": 2, "batch_size": 4}, "validation": {"times": 0}}
LETTERS = (
    "{% for m in messages %}{{ '<|im_start|>' + ('Q' if m.role == 'user' else 'A') + '\\n' + m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>A\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any) -> Path:
    """Two models of one vocabulary and two templates; rows of two languages, some too long, some answered by a symbol."""
    root = tmp_path_factory.mktemp("records")
    table = [{**row, "context": row["context"] * 6} for row in rows(60)]
    table += [
        {"instruction": f"Is {i} fine, yes or no?", "response": "👍", "context": "", "language": "und"} for i in range(20)
    ]
    table += [
        {"instruction": f"Write on {i}. " + "amber " * 60, "response": "peat", "context": "", "language": "en"}
        for i in range(20)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    for seed, name in enumerate(("chatml", "letters")):
        tokenizer = chat_tokenizer()
        if name == "letters":
            tokenizer.chat_template = LETTERS
        save_model(tiny_model("qwen2", len(tokenizer), seed=seed), tokenizer, root / name)
    return root


def recipe(root: Path, *stages: dict[str, Any], **more: Any) -> Any:
    splits = {"validation": 0.1, "test": 0.3}
    data = {
        "kind": "jsonl",
        "path": str(root / "rows.jsonl"),
        "context": "context",
        "language_column": "language",
        "splits": splits,
    }
    return parse_recipe({"name": "records", "data": data, "prompts": TIGHT, "stage": list(stages), **more})


def evaluation(*models: tuple[str, str, str], **more: Any) -> dict[str, Any]:
    table = [{"name": name, "role": role, "model": model} for name, role, model in models]
    metrics = {"metrics": ["rouge_l", "exact_match", "nll"]} if "teacher_reads" not in more else {}
    return {"name": "eval", "kind": "evaluate", "study": table, "decoding": {"max_new_tokens": 3}, **metrics, **more}


def measured(root: Path, out: Path, *stages: dict[str, Any], **more: Any) -> Study:
    return Study.load(run_recipe(recipe(root, *stages, **more), out)["eval"].folder)


def test_rows_left_out_cut_and_abstained_from_are_counted_over_test_rows_alone(root: Path, tmp_path: Path) -> None:
    model = f"path:{root / 'chatml'}"
    stage = evaluation(("SFT", "sft", model))
    study = measured(root, tmp_path / "all", stage)
    (parsed,) = recipe(root, stage).stages
    renderer, counts = Renderer(load_tokenizer(model), Prompts(**TIGHT)), Counts()
    kept = [example for example in parsed.data.examples("test") if any(instruction_pairs([example], renderer, counts))]
    assert study.left_out == dict(counts.dropped)
    assert sum(study.left_out.values()) > 0
    assert study.shortened == counts.context_shortened > 0
    assert study.of_rows == sum(1 for _ in parsed.data.examples("test")) == len(kept) + sum(study.left_out.values())
    assert study.languages == dict(Counter(example.language for example in kept))
    (row,) = study.rows
    symbols = sum(example.response == "👍" for example in kept)
    assert symbols > 0
    assert row.abstentions == {"rouge_l": {"no accepted answer holds a word: only symbols or punctuation": symbols}}
    assert study.unfit["rouge_l"].startswith(f"on {symbols} of {len(kept)} rows (und), the language is not known")
    asked = [prompt for prompt, _ in instruction_pairs(kept, renderer, Counts())]
    answers = generate(load_model(model), renderer.tokenizer, asked, stop_ids=renderer.stop_ids, max_new_tokens=3)
    assert row.cut_answers == (sum(answers.cut),)
    told = " ".join(analyse(study, resamples=50).caveats)
    assert f"{sum(study.left_out.values())} of {study.of_rows} test rows were left out before scoring" in told
    assert f"The contexts of {study.shortened} of {len(kept)} test rows were shortened" in told
    assert f"SFT {symbols} of {len(kept)}: {symbols} no accepted answer holds a word" in told
    drawn = measured(root, tmp_path / "drawn", evaluation(("SFT", "sft", model), rows=4))
    assert len(drawn.examples) == 4
    assert drawn.shortened <= 4
    assert (drawn.of_rows, drawn.left_out) == (study.of_rows, study.left_out)


def test_bfloat16_answers_and_float32_scores(root: Path, tmp_path: Path) -> None:
    """The precision is of the answers alone."""
    model = f"path:{root / 'chatml'}"
    studies = {
        precision: measured(
            root,
            tmp_path / precision,
            evaluation(("SFT", "sft", model), decoding={"max_new_tokens": 12, "precision": precision}),
        )
        for precision in ("fp32", "bf16")
    }
    assert studies["bf16"].rows[0].scores["nll"] == studies["fp32"].rows[0].scores["nll"]
    renderer = Renderer(load_tokenizer(model), Prompts(**TIGHT))
    examples = {
        fingerprint(e.key)[:16]: e for e in recipe(root, evaluation(("SFT", "sft", model))).stages[0].data.examples("test")
    }
    said = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        (file,) = (tmp_path / precision).glob("artifacts/eval-*/answers.jsonl")
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        said[precision] = [line["answers"]["SFT"][0] for line in lines]
        asked = [prompt for prompt, _ in instruction_pairs([examples[line["key"]] for line in lines], renderer, Counts())]
        answers = generate(load_model(model, dtype), renderer.tokenizer, asked, stop_ids=renderer.stop_ids, max_new_tokens=12)
        assert said[precision] == answers.texts
    assert said["fp32"] != said["bf16"]
    told = [" ".join(analyse(study, resamples=50).caveats) for study in studies.values()]
    assert ["bfloat16" in words for words in told] == [False, True]


def test_a_teacher_that_was_made_to_read_another_form_is_a_caveat(root: Path, tmp_path: Path) -> None:
    kd = {"name": "kd", "kind": "distill", "student": f"path:{root / 'letters'}", "teacher": f"path:{root / 'chatml'}", **QUIET}
    rows = (("KD", "kd", "stage:kd"), ("Teacher", "teacher", f"path:{root / 'chatml'}"))
    stages = ({**kd, "teacher_reads": "student"}, evaluation(*rows, teacher_reads="student"))
    study = measured(root, tmp_path / "forced", *stages)
    student, teacher = study.rows
    assert student.template != teacher.template
    assert student.teacher_reads is not None
    assert student.teacher_reads.startswith("at token 1 of the prompt")
    assert teacher.teacher_reads is None
    told = " ".join(analyse(study, resamples=50).caveats)
    assert "The teacher of KD was made to read the rows in the student's form" in told
    assert "For KL to teacher of KD the teacher was made to read the rows in a form that is not its own" in told
    own = measured(root, tmp_path / "own", stages[0], evaluation(*rows, teacher_reads="own"))
    assert "KL to teacher was not taken of KD" in " ".join(analyse(own, resamples=50).caveats)


def test_test_rows_that_training_nearly_repeats_are_a_caveat_of_models_trained_on_them(tmp_path: Path) -> None:
    save_model(tiny_model("qwen2", len(chat_tokenizer())), chat_tokenizer(), tmp_path / "small")
    draw = random.Random(5)
    questions = [" ".join(draw.choices(WORDS.split(), k=12)) + f" {i}" for i in range(60)]
    asked = [text for question in questions for text in (question, f"{question} please")]
    lines = (json.dumps({"instruction": text, "response": "peat", "context": "", "language": "en"}) + "\n" for text in asked)
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    model = f"path:{tmp_path / 'small'}"
    sft = {"name": "sft", "kind": "sft", "model": model, **QUIET}
    study = measured(tmp_path, tmp_path / "a", sft, evaluation(("SFT", "sft", "stage:sft")))
    assert "test rows are nearly repeated by training rows" in study.near_duplicates
    assert any(study.near_duplicates in caveat for caveat in analyse(study, resamples=50).caveats)
    assert measured(tmp_path, tmp_path / "b", evaluation(("Base", "base", model))).near_duplicates == ""


def test_a_metric_is_unfit_for_the_rows_whose_language_it_cannot_read() -> None:
    from potstill.metrics.rouge_l import RougeL

    assert unfit(RougeL(), {"en": 4, "es": 1}) == ""
    assert unfit(RougeL(), {"und": 4}).startswith("the language is not known")
    assert unfit(RougeL(), {"en": 3, "und": 1}).startswith("on 1 of 4 rows (und), the language is not known")


# Exports


def with_export(root: Path, exported: str, measured: str, **export: Any) -> Any:
    stages = [
        {"name": "sft", "kind": "sft", "model": f"path:{root / 'chatml'}", **QUIET},
        {"name": "other", "kind": "sft", "model": f"path:{root / 'chatml'}", **QUIET},
        evaluation(("SFT", "sft", measured)),
        {"name": "export", "kind": "export", "model": exported, "formats": ["safetensors"], **export},
        {"name": "report", "kind": "report", "study": "stage:eval", "exports": ["stage:export"]},
    ]
    return recipe(root, *stages)


def test_an_export_of_a_model_that_was_not_measured_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"report.exports\[0\].*'export' exports stage:other, which 'eval' does not measure"):
        with_export(root, "stage:other", "stage:sft")


def test_a_report_before_its_stage_ran_knows_the_exports_that_are_whole(root: Path, tmp_path: Path) -> None:
    import shutil

    done = run_recipe(with_export(root, "stage:sft", "stage:sft"), tmp_path)
    (row,) = report_of(tmp_path)[0]["rows"]
    assert [file["name"] for file in row["files"]] == ["model.safetensors"]
    shutil.rmtree(done["report"].folder)
    found, page = report_of(tmp_path)
    assert found["rows"][0]["files"] == [row["files"][0]]
    assert page.startswith("no page yet")
    (done["export"].folder / "model.safetensors").unlink()
    assert report_of(tmp_path)[0]["rows"][0]["files"] == []


def test_a_report_of_an_older_version_is_refused_with_the_remedy(root: Path, tmp_path: Path) -> None:
    from potstill.report.build import read_report

    (tmp_path / "report.json").write_text('{"schema": 1, "rows": []}', encoding="utf-8")
    with pytest.raises(UserError, match="was made by an older potstill: run the recipe again"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("[", encoding="utf-8")
    with pytest.raises(UserError, match="is damaged"):
        read_report(tmp_path)


# What could be shown


def could_show(root: Path, seeds: list[int], **more: Any) -> str:
    parsed = recipe(
        root,
        {"name": "sft", "kind": "sft", "model": f"path:{root / 'chatml'}", "per_seed": True, **QUIET},
        {"name": "kd4", "kind": "quantize", "model": "stage:sft"},
        evaluation(("SFT", "sft", "stage:sft"), ("4-bit", "quantized", "stage:kd4"), **more),
        seeds=seeds,
    )
    outlook = Outlook(seeds=len(seeds))
    for stage in parsed.stages:
        outlook.add(stage)
    assert outlook.seeds_of(parsed.stages[-1].study[1].model) == len(seeds)
    return parsed.stages[-1].could_show(outlook)


def test_a_study_says_the_smallest_difference_that_it_could_show(root: Path, tmp_path: Path) -> None:
    N = len(measured(root, tmp_path, evaluation(("SFT", "sft", f"path:{root / 'chatml'}"))).examples)
    told = could_show(root, [1, 2, 3])
    assert told.startswith(f"eval: {N} test rows and 3 seeds can show a difference of about ")
    assert told.count("points of Rouge-L") == 1
    assert could_show(root, [1]).startswith(f"eval: {N} test rows and 1 seed can show")
    assert could_show(root, [1, 2], rows=9).startswith("eval: 9 test rows and 2 seeds can show")
    assert (
        could_show(root, [1, 2], primary="nll") == "eval: how much rows differ by NLL is not known, so not what could be shown."
    )
