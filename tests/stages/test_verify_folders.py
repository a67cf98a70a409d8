"""Exported folders opened in their runtimes: packed codes in transformers, the page's model in llama.cpp."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from llamacpp import needs_llamacpp
from safetensors.torch import load_file, save_file
from tiny_parts import chat_tokenizer, tiny_model, write_rows

import potstill
from potstill.cli import main
from potstill.core.artifact import MANIFEST, Artifact
from potstill.core.errors import UserError
from potstill.edges import compressed
from potstill.edges.models import save_model
from potstill.exporters import _wllama
from potstill.report.verified import section
from potstill.stages.export import Export
from potstill.stages.verified import VERIFIED

pytest.importorskip("compressed_tensors", reason="the loader is not here: pip install --no-deps compressed-tensors loguru")
PACKED = "compressed-tensors/model.safetensors"
PAGE = "web/model.bin"


@pytest.fixture(scope="module")
def pages() -> bool:
    """Whether wllama can be had, without which no page is written."""
    try:
        _wllama._packed()
        return True
    except UserError:
        return False


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    root = tmp_path_factory.mktemp("folders")
    tokenizer = chat_tokenizer()
    save_model(tiny_model("qwen2", len(tokenizer), eos=tokenizer.eos_token_id, std=0.1), tokenizer, root / "base")
    data = potstill.Jsonl(path=str(write_rows(root / "rows.jsonl")), language_column="language")
    prompts = potstill.Prompts(max_tokens=250, max_prompt_tokens=200)
    quantize = potstill.Quantize(name="q4", model=f"path:{root / 'base'}", data=data, prompts=prompts, rows=4, method="rtn")
    return potstill.run_stage(quantize, root / "q4")


@pytest.fixture(scope="module")
def exported(four: Artifact, pages: bool) -> Artifact:
    formats = ["safetensors", "compressed_tensors", *(["web"] if pages else [])]
    return potstill.run_stage(Export(model=four, formats=formats), four.folder.parent / "export")


def verify(*words: Any) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, words), "--positions", "8"], catch_exceptions=False)


def files_of(folder: Path) -> dict[str, Any]:
    return {one["file"]: one for one in json.loads((folder / VERIFIED).read_text(encoding="utf-8"))["files"]}


@needs_llamacpp
def test_every_file_is_opened_and_weights_that_can_be_read_are_equal_to_the_bit(exported: Artifact, pages: bool) -> None:
    found = files_of(exported.folder)
    assert set(found) == {"model.safetensors", PACKED, *([PAGE] if pages else [])}
    assert all(one["passed"] and not one["differ"] and one["texts"] >= 80 for one in found.values())
    for name in ("model.safetensors", PACKED):
        assert found[name]["weights"]["count"] > 20
        assert found[name]["weights"]["differ"] == []
        assert found[name]["kl"] < 1e-9
        assert found[name]["limit"] == 1e-4
    assert (found[PACKED]["type"], found[PACKED]["runtime"]) == ("int4", "transformers, compressed-tensors")
    if pages:
        assert 0 < found[PAGE]["kl"] < 0.02
        assert (found[PAGE]["type"], found[PAGE]["runtime"]) == ("q4_0", "llama.cpp")
        assert found[PAGE]["texts"] > found[PACKED]["texts"], "what spells a control token is text to the page"
    assert f"verified: {PACKED} KL" in Export(model="path:x").closing(exported.summary)
    done = verify(exported.folder)
    assert done.exit_code == 0
    assert f"{found[PACKED]['weights']['count']} of {found[PACKED]['weights']['count']} weights are" in done.stdout


def flip_a_bit(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj.weight_packed"))
    tensors[name][0, 0] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def next_scale(folder: Path) -> None:
    """One float16 further, which no distribution shows."""
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj.weight_scale"))
    tensors[name].view(torch.int16)[0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text(encoding="utf-8") + " ", encoding="utf-8")


def no_end(folder: Path) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 0}))


def half(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    "spoil, why",
    [
        (flip_a_bit, "1 of 26 weights are not the model's, the first is 'model.layers.0.mlp.down_proj.weight'"),
        (next_scale, "1 of 26 weights are not the model's, the first is 'model.layers.0.mlp.down_proj.weight'"),
        (other_template, "its chat template is not the model's"),
        (no_end, "as an end of answers"),
        (half, "cannot be opened"),
    ],
)
def test_a_folder_that_holds_another_model_fails(
    spoil: Callable[[Path], None], why: str, exported: Artifact, four: Artifact, tmp_path: Path
) -> None:
    """With the manifest before it is opened, without one by what the runtime makes of it."""
    shutil.copytree(exported.folder / "compressed-tensors", tmp_path / "out" / "compressed-tensors")
    spoil(tmp_path / "out" / "compressed-tensors")
    done = verify(tmp_path / "out", "--against", f"path:{four.folder}")
    assert done.exit_code == 1, done.output
    assert why in " ".join(done.stdout.split())
    shutil.copy(exported.folder / MANIFEST, tmp_path / "out")
    done = verify(tmp_path / "out" / PACKED, "--against", f"path:{four.folder}")
    assert done.exit_code == 1, done.output
    assert f"{PACKED} FAILED" in done.stdout
    assert "KL" not in done.stdout, "it is not opened"


@needs_llamacpp
def test_a_page_that_writes_other_prompts_or_is_not_whole_fails(
    exported: Artifact, four: Artifact, pages: bool, tmp_path: Path
) -> None:
    if not pages:
        pytest.skip("no wllama here")
    shutil.copytree(exported.folder / "web", tmp_path / "web")
    against = ("--against", f"path:{four.folder}")
    assert verify(tmp_path / "web", *against).exit_code == 0
    told = json.loads((tmp_path / "web" / "model.json").read_text())
    told["pieces"]["closing"] += " "
    (tmp_path / "web" / "model.json").write_text(json.dumps(told))
    (tmp_path / "web" / "wllama.wasm").unlink()
    said = " ".join(verify(tmp_path / "web", *against).stdout.split())
    assert "wllama.wasm is missing beside it; model.json: its chat template is not the model's" in said
    shutil.copytree(exported.folder, tmp_path / "export")
    script = tmp_path / "export" / "web" / "page.js"
    script.write_bytes(script.read_bytes()[:-1] + b" ")
    done = verify(tmp_path / "export" / PAGE, *against)
    assert done.exit_code == 1, done.output
    assert f"{PAGE} FAILED: web/page.js has the right size and another content" in done.stdout


def test_without_the_loader_the_command_that_installs_it_is_said(
    exported: Artifact, four: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed, "PACKAGE", "no_such_loader")
    why = "the package compressed-tensors is not here; pip install compressed-tensors"
    done = verify(exported.folder / PACKED, "--against", f"path:{four.folder}")
    assert done.exit_code == 1, done.output
    assert f"{PACKED} is not verified: {why}" in " ".join(done.stdout.split())
    made = potstill.run_stage(Export(model=four, formats=("compressed_tensors",)), tmp_path / "export")
    record = json.loads((made.folder / VERIFIED).read_text())
    assert record["not_verified"] == {PACKED: why}
    assert f"was not verified: {why}" in "\n".join(section(record))
    with pytest.raises(UserError, match="pip install compressed-tensors, or set it to 'auto'"):
        potstill.run_stage(Export(model=four, formats=("compressed_tensors",), verify="always"), tmp_path / "always")


def test_a_folder_alone_needs_the_model_that_it_was_made_from(exported: Artifact, tmp_path: Path) -> None:
    shutil.copytree(exported.folder / "compressed-tensors", tmp_path / "copy")
    done = verify(tmp_path / "copy")
    assert done.exit_code == 2
    assert "alone, with no model to compare it with; name it with --against" in done.stderr
