"""Latency and memory of exported files: measured in the runtime, in turn, and shown beside the models' quality."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, needs_chromium
from llamacpp import needs_llamacpp
from rich.console import Console
from tiny_parts import chat_tokenizer, tiny_model, write_rows

from potstill.core.errors import UserError
from potstill.edges import browser as browser_edge
from potstill.edges import llamacpp
from potstill.edges.models import save_model
from potstill.exporters import _wllama
from potstill.recipe.parse import parse_recipe
from potstill.report import drafted
from potstill.report.figures import on_device
from potstill.report.html import render_html
from potstill.report.table import print_table
from potstill.run.runner import run_recipe, run_stage
from potstill.stages.device import Device

HOSTILE = "4-bit <script>"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    tokenizer = chat_tokenizer()
    save_model(tiny_model("qwen2", len(tokenizer), eos=tokenizer.eos_token_id, std=0.1), tokenizer, folder / "base")
    write_rows(folder / "rows.jsonl")
    return folder


def table(root: Path, **device: Any) -> dict[str, Any]:
    where = f"path:{root / 'base'}"
    study = [
        {"name": "Base", "role": "teacher", "model": where},
        {"name": HOSTILE, "role": "quantized", "model": "stage:four"},
    ]
    data = {"kind": "jsonl", "path": str(root / "rows.jsonl"), "language": "en", "splits": {"validation": 0.1, "test": 0.3}}
    quiet = {"verify": "never"}
    return {
        "name": "device",
        "data": data,
        "prompts": {"max_tokens": 128, "max_prompt_tokens": 96},
        "stage": [
            {"name": "four", "kind": "quantize", "model": where, "rows": 4},
            {"name": "study", "kind": "evaluate", "study": study, "metrics": ["nll"], "primary": "nll"},
            {
                "name": "wide",
                "kind": "export",
                "model": where,
                "formats": [{"kind": "gguf", "types": ["f16", "q8_0"]}],
                **quiet,
            },
            {"name": "narrow", "kind": "export", "model": "stage:four", "formats": ["gguf"], **quiet},
            {
                "name": "device",
                "kind": "device",
                "exports": ["stage:wide", "stage:narrow"],
                "contexts": [8, 40],
                "new_tokens": 6,
                "repeats": 2,
                "drafts": [{"export": "stage:wide", "draft": "stage:narrow", "ahead": 2}],
                **device,
            },
            {"name": "report", "kind": "report", "study": "stage:study", "device": "stage:device"},
        ],
    }


@needs_llamacpp
def test_every_file_is_measured_and_shown_beside_its_models_quality(root: Path, tmp_path: Path) -> None:
    done = run_recipe(parse_recipe(table(root)), tmp_path / "run")
    made = json.loads((done["device"].folder / "device.json").read_text())
    assert [one["file"] for one in made["files"]] == ["model-f16.gguf", "model-q8_0.gguf", "model-q4_0.gguf"]
    for one in made["files"]:
        assert [(case["threads"], case["context"]) for case in one["latency"]] == [(1, 8), (1, 40)]
        for case in one["latency"]:
            assert len(case["all_first_s"]) == len(case["all_tokens_per_s"]) == 2
            assert min(case["all_first_s"]) <= case["first_s"] <= max(case["all_first_s"])
            assert min(case["all_tokens_per_s"]) > 0
        path = next(done[stage].folder / one["file"] for stage in ("wide", "narrow") if one["export"] == f"stage:{stage}")
        assert one["memory"]["file_bytes"] == path.stat().st_size
        assert one["memory"]["resident_bytes"] > 0
    assert made["machine"]["processor"]
    _check_drafts(made["drafts"])
    report = json.loads((done["report"].folder / "report.json").read_text())
    assert [(one["name"], one["role"], one["type"]) for one in report["device"]["files"]] == [
        ("Base", "teacher", "f16"),
        ("Base", "teacher", "q8_0"),
        (HOSTILE, "quantized", "q4_0"),
    ]
    page = (done["report"].folder / "report.html").read_text(encoding="utf-8")
    assert "<h2>On the device</h2>" in page
    assert "<script>" not in page
    assert 'id="device' in page
    assert on_device(report).count("<svg") == 1
    console = Console(width=100, record=True, file=io.StringIO())
    print_table(report, console)
    told = console.export_text()
    assert "On the device" in told
    assert "Base q8_0" in told
    assert "With a draft model" in told
    assert [(one["name"], one["draft_name"]) for one in report["device"]["drafts"]] == 2 * [("Base", HOSTILE)]
    assert page.count('<th class="n">Ahead</th>') == 1
    of_nothing = report["device"]["drafts"][0] | {"drafted": 0, "accepted": 0, "acceptance_percent": None}
    assert [line["acceptance"] for line in drafted.lines({"drafts": [of_nothing]})] == ["–"]
    report["device"] = {}
    assert on_device(report) == ""
    assert "On the device" not in render_html(report)


def _check_drafts(found: list[dict[str, Any]]) -> None:
    """Every file of the one export with the file of the other, in turn."""
    assert [(one["file"], one["draft_file"], one["threads"]) for one in found] == [
        ("model-f16.gguf", "model-q4_0.gguf", 1),
        ("model-q8_0.gguf", "model-q4_0.gguf", 1),
    ]
    for one in found:
        alone, both, ratios = (one[f"all_{what}"] for what in ("alone_tokens_per_s", "tokens_per_s", "speed_ups"))
        assert ratios == [b / a for a, b in zip(alone, both, strict=True)]
        assert len(ratios) == 2
        assert one["speed_up"] == sum(ratios) / 2
        assert 0 <= one["accepted"] <= one["drafted"] > 0
        assert one["acceptance_percent"] == 100 * one["accepted"] / one["drafted"]
        assert (one["prompts"], one["of"]) == (4, "4 validation rows of four")


def test_what_cannot_be_measured_is_refused_before_anything_runs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = table(root, threads=[0])
    wrong["stage"][2]["formats"] = ["safetensors"]
    tokenizer = chat_tokenizer(330)
    save_model(tiny_model("qwen2", len(tokenizer), eos=tokenizer.eos_token_id), tokenizer, root / "stranger")
    wrong["stage"].insert(4, {"name": "strange", "kind": "export", "model": f"path:{root / 'stranger'}", "formats": ["gguf"]})
    wrong["stage"][5]["drafts"] = [{"export": "stage:narrow", "draft": "stage:strange"}]
    monkeypatch.setattr(llamacpp, "PACKAGE", "no_such_runtime")
    with pytest.raises(UserError) as error:
        run_recipe(parse_recipe(wrong), tmp_path / "run")
    told = str(error.value)
    assert "measures in llama.cpp, and llama.cpp is not here; pip install 'potstill[device]'" in told
    assert "device.threads = [0]" in told
    assert "stage:wide writes no GGUF file and no page; add 'gguf' to its formats" in told
    assert "device.drafts[0]" in told
    assert "different tokenizers" in told
    assert "a draft model needs the tokenizer of the model that it drafts for" in told
    assert not list((tmp_path / "run" / "artifacts").iterdir())


def test_exports_that_only_drafts_name_are_looked_at_like_the_others(root: Path, tmp_path: Path) -> None:
    """Before the cost: what holds no GGUF file, also where it lies in a folder, and positions that an answer alone fills."""
    made = table(root)
    made["stage"] = [stage for stage in made["stage"] if stage["name"] in ("four", "wide")]
    made["stage"][1]["formats"] = ["safetensors"]
    folder = run_recipe(parse_recipe(made), tmp_path / "made")["wide"].folder
    wrong = table(root, exports=["stage:wide", f"path:{folder}"], new_tokens=200)
    wrong["stage"].insert(3, {"name": "plain", "kind": "export", "model": "stage:four", "formats": ["safetensors"]})
    wrong["stage"][5]["drafts"] = [
        {"export": "stage:plain", "draft": f"path:{folder}"},
        {"export": "stage:wide", "draft": "stage:narrow", "ahead": 60},
    ]
    with pytest.raises(UserError) as error:
        run_recipe(parse_recipe(wrong), tmp_path / "run")
    told = " ".join(str(error.value).split())
    assert f"device.exports[1] = path:{folder} path:{folder} writes no GGUF file and no page" in told
    assert "device.drafts[0].export = stage:plain stage:plain writes no GGUF file; add 'gguf' to its formats" in told
    assert f"device.drafts[0].draft = path:{folder} path:{folder} writes no GGUF file" in told
    assert "device.contexts = [8, 40]" not in told, "the prompts fit"
    assert "device.new_tokens = 200 an answer of 200 and a draft of 60 tokens leave no room for a prompt" in told
    assert "stage:four has 256 positions; use at most 187" in told


@pytest.fixture(scope="module")
def without_browser(root: Path) -> dict[str, Any]:
    """A finished run whose only export is a page, on a machine without a browser."""
    try:
        wllama = str(_wllama._packed())
    except UserError as error:
        pytest.skip(f"no wllama here: {error}")
    made = table(root, exports=["stage:narrow"], repeats=1, drafts=[])
    made["stage"] = [stage for stage in made["stage"] if stage["name"] != "wide"]
    made["stage"][2]["formats"] = [{"kind": "web", "wllama": wllama}]
    made["stage"][-1]["exports"] = ["stage:narrow"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(browser_edge, "PROGRAMS", ())
        return run_recipe(parse_recipe(made), root / "page-run")


def test_without_a_browser_a_pages_line_says_so(without_browser: dict[str, Any]) -> None:
    assert [one["why"] for one in without_browser["device"].summary["pages"]] == ["no browser is here; install chromium"]
    page = (without_browser["report"].folder / "report.html").read_text(encoding="utf-8")
    assert "not measured: no browser is here; install chromium" in page
    assert "not opened" in page, "its export was told to verify nothing"


@needs_chromium
def test_a_page_is_measured_in_a_browser(without_browser: dict[str, Any], tmp_path: Path) -> None:
    narrow = without_browser["narrow"]
    stage = Device(name="device", exports=(narrow,), new_tokens=6, repeats=2, browser=str(CHROMIUM))
    (made,) = run_stage(stage, tmp_path / "device").summary["pages"]
    assert (made["type"], made["tokens"]) == ("q4_0", 6)
    assert made["folder_bytes"] == sum(path.stat().st_size for path in (narrow.folder / "web").iterdir())
    for key in ("load_s", "first_s", "tokens_per_s"):
        assert len(made[f"all_{key}"]) == 2
        assert min(made[f"all_{key}"]) > 0
    assert "Chrom" in made["browser"]


def test_a_browser_that_is_named_must_be_there_and_measure(without_browser: dict[str, Any], tmp_path: Path) -> None:
    stage = Device(name="device", exports=(without_browser["narrow"],), repeats=1, browser="no-such-browser")
    with pytest.raises(UserError, match="'no-such-browser' is no program on PATH; install it, or leave it to 'auto'"):
        run_stage(stage, tmp_path / "absent")
    with pytest.raises(UserError, match="did not measure the page: the browser ended"):
        run_stage(stage.model_copy(update={"browser": "true"}), tmp_path / "true")


def test_root_opens_no_page_of_others_unasked(
    without_browser: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its browser would have no sandbox."""
    monkeypatch.setattr(browser_edge, "PROGRAMS", ("true",))
    for user, why in ((0, "a browser has no sandbox as root; set browser = 'chromium'"), (1000, "the browser ended")):
        monkeypatch.setattr("os.geteuid", lambda user=user: user)
        stage = Device(name="device", exports=(without_browser["narrow"],), repeats=1)
        (page,) = run_stage(stage, tmp_path / str(user)).summary["pages"]
        assert page["why"].startswith(why)
