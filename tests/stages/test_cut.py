"""A student cut by what training rows show: one stage for SFT and distillation, in the study, in the report, in the plan."""

from pathlib import Path
from typing import Any

import pytest
from tiny_parts import chat_tokenizer, tiny_model, write_rows

from potstill.commands.plan import estimate
from potstill.core.errors import RecipeError
from potstill.edges.models import load_model, save_model
from potstill.inits.layers import Layers
from potstill.recipe.parse import parse_recipe
from potstill.report.build import read_report
from potstill.run.runner import run_recipe
from potstill.study.records import Study

OPTIM = {"steps": 3, "batch_size": 8, "lr": 3e-3}


def recipe(folder: Path, init: dict[str, Any], *, own: bool = False) -> dict[str, Any]:
    """Base, cut base, SFT and KD; `own`: SFT and KD cut the model themselves."""
    model = f"path:{folder / 'model'}"
    begin = {"init": init} if own else {}
    cut = model if own else "stage:cut"
    stages: list[dict[str, Any]] = [] if own else [{"name": "cut", "kind": "cut", "model": model, "init": init}]
    train = {"optim": OPTIM, "validation": {"times": 0}, **begin}
    stages += [
        {"name": "sft", "kind": "sft", "model": cut, "per_seed": True, **train},
        {"name": "kd", "kind": "distill", "student": cut, "teacher": model, "per_seed": True, **train},
    ]
    study = [
        {"name": "Base", "role": "base", "model": model},
        *([] if own else [{"name": "Cut", "role": "base", "model": "stage:cut"}]),
        {"name": "SFT", "role": "sft", "model": "stage:sft"},
        {"name": "KD", "role": "kd", "model": "stage:kd"},
        {"name": "Teacher", "role": "teacher", "model": model},
    ]
    asked = {"ask": ["What is amber?", "And <b>oak</b>?"], "decoding": {"max_new_tokens": 4}, "metrics": ["rouge_l", "nll"]}
    stages.append({"name": "study", "kind": "evaluate", "study": study, **asked})
    stages.append({"name": "report", "kind": "report", "study": "stage:study"})
    data = {"kind": "jsonl", "path": str(folder / "rows.jsonl"), "context": "context"}
    prompts = {"max_tokens": 128, "max_prompt_tokens": 96}
    return {"name": "cut", "seeds": [1, 2], "data": data, "prompts": prompts, "stage": stages}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    chat = chat_tokenizer()
    save_model(tiny_model("qwen2", len(chat), num_hidden_layers=4), chat, tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


def test_one_cut_for_the_control_and_the_distilled_model(folder: Path) -> None:
    made = run_recipe(parse_recipe(recipe(folder, {"kind": "layers", "count": 2, "rows": 4})), folder / "run")
    cut = made["cut"]
    figures = cut.summary["cut"]
    assert [len(figures["removed"]), len(figures["keep"]), figures["rows"]] == [2, 2, 4]
    assert figures["nll"] == pytest.approx(figures["removed"][-1]["nll"], abs=1e-5)
    by_hand = Layers(keep=tuple(figures["keep"]))(load_model(f"path:{folder / 'model'}"))
    loaded = load_model(f"path:{cut.folder}")
    assert all((a == b).all() for a, b in zip(loaded.parameters(), by_hand.parameters(), strict=True))

    study = Study.load(made["study"].folder)
    sft, kd = (next(row for row in study.rows if row.name == name) for name in ("SFT", "KD"))
    words = "(kind layers, count 2, by loss, rows 4)"
    assert {one.init for row in (sft, kd) for one in row.trained or ()} == {words}
    assert {row.parameters for row in study.rows if row.name in ("SFT", "KD", "Cut")} == {cut.summary["parameters"]}

    report = read_report(made["report"].folder)
    assert [(one["stage"], one["keep"]) for one in report["cuts"]] == [("cut", figures["keep"])], "once, not per seed"
    assert [one["prompt"] for one in report["asked"]] == ["What is amber?", "And <b>oak</b>?"]
    assert all(set(one["answers"]) == {"Base", "Cut", "SFT", "KD", "Teacher"} for one in report["asked"])
    page = (made["report"].folder / "report.html").read_text("utf-8")
    assert "How the student was cut" in page
    assert "Asked besides" in page
    assert "And &lt;b&gt;oak" in page


def test_stages_that_cut_by_themselves_choose_alike(folder: Path) -> None:
    init = {"kind": "width", "intermediate_size": 32, "rows": 4}
    made = run_recipe(parse_recipe(recipe(folder, init, own=True)), folder / "run")
    figures = [made[name].summary["cut"] for name in ("sft@1", "sft@2", "kd@1", "kd@2")]
    assert len(figures) == 4
    assert all(one == figures[0] for one in figures)
    assert 0 < figures[0]["intermediate_size_share"] < 1
    assert figures[0]["heads_share"] == pytest.approx(1)
    report = read_report(made["report"].folder)
    assert report["cuts"]


def test_a_plan_knows_the_smaller_model(folder: Path) -> None:
    made = parse_recipe(recipe(folder, {"kind": "layers", "count": 2}))
    lines = {line.json()["stage"]: line.json() for line in estimate(made, folder / "run", measure=True).lines}
    assert lines["cut"]["parameters"] < sum(p.numel() for p in load_model(f"path:{folder / 'model'}").parameters())
    assert lines["cut"]["seconds"] > 0
    assert lines["kd@1"]["parameters"] == lines["cut"]["parameters"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ask": ["  "]}, r"ask\[0\]: is empty; write another prompt"),
        ({"ask": ["amber " * 300]}, r"ask\[0\]: prompt too long; write another prompt, or raise prompts.max_prompt_tokens"),
    ],
)
def test_a_prompt_of_ones_own_that_cannot_be_asked_is_refused_before_the_run(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    table = recipe(folder, {"kind": "layers", "count": 2})
    next(stage for stage in table["stage"] if stage["kind"] == "evaluate").update(change)
    with pytest.raises(RecipeError, match=message):
        run_recipe(parse_recipe(table), folder / "run")


def test_more_layers_than_there_are_is_refused_before_the_run(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"cut.init.count = 4  the model has 4 layers; choose fewer than that"):
        run_recipe(parse_recipe(recipe(folder, {"kind": "layers", "count": 4})), folder / "run")
