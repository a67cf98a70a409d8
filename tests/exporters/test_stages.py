"""Quantising and exporting as stages: what they refuse before the cost, which dtype and name leave, what is said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_parts import chat_tokenizer, tiny_model, write_rows

import potstill
from potstill.core.errors import UserError
from potstill.edges.models import bytes_of, load_stored, save_model, stored_dtype
from potstill.quant.finished import LayerError
from potstill.stages.quantize import notes_on

PROMPTS = potstill.Prompts(max_tokens=250, max_prompt_tokens=200)


def saved(folder: Path, dtype: torch.dtype | None = None, **shape: Any) -> str:
    tokenizer = chat_tokenizer()
    save_model(tiny_model("qwen2", len(tokenizer), eos=tokenizer.eos_token_id, **shape), tokenizer, folder, dtype=dtype)
    return f"path:{folder}"


def quantize(where: str, folder: Path, **fields: Any) -> potstill.Artifact:
    data = potstill.Jsonl(path=str(write_rows(folder / "rows.jsonl")))
    stage = potstill.Quantize(model=where, data=data, prompts=PROMPTS, rows=4, **fields)
    return potstill.run_stage(stage, into=folder / "q4")


def export(model: Any, folder: Path, *formats: Any) -> potstill.Artifact:
    return potstill.run_stage(potstill.Export(model=model, formats=formats or ("safetensors", "gguf")), into=folder)


def dtypes_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("dtype, name", [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")])
def test_the_dtype_that_came_in_goes_out(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    where = saved(tmp_path / "base", dtype)
    assert stored_dtype(where) == dtype
    folder = export(where, tmp_path / "export").folder
    assert dtypes_in(tmp_path / "base") == dtypes_in(folder) == {name}
    assert potstill.load_model(f"path:{folder}", dtype="auto").config.dtype == dtype
    before, after = (load_file(f / "model.safetensors") for f in (tmp_path / "base", folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_dtype_that_config_claims_and_the_file_has_not_rounds_nothing(tmp_path: Path) -> None:
    where = saved(tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    assert {p.dtype for p in load_stored(where).parameters()} == {torch.float32}
    mixed = {k: v.bfloat16() if "norm" not in k else v for k, v in load_file(tmp_path / "base/model.safetensors").items()}
    save_file(mixed, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    assert stored_dtype(where) == torch.float32


def test_a_quantised_bfloat16_model_is_float32_where_nothing_smaller_is_exact(tmp_path: Path) -> None:
    made = quantize(saved(tmp_path / "base", torch.bfloat16), tmp_path)
    weights, codes = (load_file(made.folder / name) for name in ("model.safetensors", "packed.safetensors"))
    rounded = {f"{name.removesuffix('.codes')}.weight" for name in codes if name.endswith(".codes")}
    assert rounded
    assert {name: weight.dtype for name, weight in weights.items()} == {
        name: torch.float32 if name in rounded else torch.bfloat16 for name in weights
    }
    base = load_file(tmp_path / "base/model.safetensors")
    assert all(weights[name].equal(base[name]) for name in weights if name not in rounded)
    loaded = potstill.load_model(f"path:{made.folder}", dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}, "as config.json says"
    assert bytes_of(made.folder) < bytes_of(tmp_path / "base"), "four bits are smaller than what they were made from"
    out = export(made, tmp_path / "export")
    assert {"model.safetensors", "model-q4_0.gguf"} <= set(out.summary["files"])
    assert "model-f16.gguf" not in out.summary["files"]
    assert dtypes_in(out.folder) == {"F32"}


def test_what_is_quantised_again_keeps_the_dtype_of_the_rest(tmp_path: Path) -> None:
    once = quantize(saved(tmp_path / "base", torch.bfloat16), tmp_path)
    (tmp_path / "again").mkdir()
    again = quantize(f"path:{once.folder}", tmp_path / "again")
    first, second = (load_file(made.folder / "model.safetensors") for made in (once, again))
    assert {name: weight.dtype for name, weight in first.items()} == {name: weight.dtype for name, weight in second.items()}


def test_weights_changed_after_quantising_are_refused_wherever_the_codes_count(tmp_path: Path) -> None:
    made = quantize(saved(tmp_path / "base"), tmp_path)
    export(made, tmp_path / "before")
    weights = load_file(made.folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-6
    save_file(weights, made.folder / "model.safetensors", metadata={"format": "pt"})
    rule = r"path:.*: the weights of 'model.layers.0.mlp.up_proj' were changed after they were quantised; quantise the model"
    with pytest.raises(UserError, match=rule):
        export(f"path:{made.folder}", tmp_path / "export")
    data = potstill.Jsonl(path=str(write_rows(tmp_path / "test.jsonl")), splits={"validation": 0.2, "test": 0.5})
    study = (potstill.Row(name="KD 4-bit", model=f"path:{made.folder}"),)
    stage = potstill.Evaluate(study=study, metrics=("nll",), primary="nll", data=data, prompts=PROMPTS)
    with pytest.raises(UserError, match=rule):
        potstill.run_stage(stage, into=tmp_path / "study")


def test_damaged_codes_are_named(tmp_path: Path) -> None:
    made = quantize(saved(tmp_path / "base"), tmp_path)
    (made.folder / "packed.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"packed.safetensors: not the codes of a quantised model .*; quantise the model again"):
        export(f"path:{made.folder}", tmp_path / "export")


def test_a_model_of_which_no_layer_could_be_quantised_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    where = saved(tmp_path / "base", width=48, intermediate_size=80)
    rule = r"group  no layer's width \(48, 80\) divides into groups of 32, so none can be quantised; leave this model"
    with pytest.raises(UserError, match=rule):
        quantize(where, tmp_path)
    with pytest.raises(UserError, match=r"width \(96\) divides into groups of 64, so none can be quantised; set group = 32"):
        quantize(saved(tmp_path / "wide", width=96, intermediate_size=96), tmp_path, group=64)


def test_the_name_in_the_file_is_for_people(tmp_path: Path) -> None:
    def name_of(folder: Path) -> str:
        return GGUFReader(next(folder.glob("*.gguf"))).fields["general.name"].contents()

    where = saved(tmp_path / "my-base")
    assert name_of(export(where, tmp_path / "one", "gguf").folder) == "my-base"
    data = potstill.Jsonl(path=str(write_rows(tmp_path / "rows.jsonl")))
    stage = potstill.Quantize(name="kd4", model=where, data=data, prompts=PROMPTS, rows=4, method="rtn")
    made = potstill.run_stage(stage, into=tmp_path / "runs")
    assert name_of(export(made, tmp_path / "two", "gguf").folder) == "kd4"
    assert name_of(export(made, tmp_path / "three", {"kind": "gguf", "name": "Peter"}).folder) == "Peter"


def test_beside_a_gguf_file_lies_how_people_run_it(tmp_path: Path) -> None:
    made = export(saved(tmp_path / "base"), tmp_path / "export", {"kind": "gguf", "types": ("f32", "f16")})
    assert "Modelfile" in made.summary["files"]
    assert (made.folder / "Modelfile").read_text().splitlines()[1:3] == ["FROM ./model-f16.gguf", "# FROM ./model-f32.gguf"]
    readme = (made.folder / "README.md").read_text()
    commands = (
        "llama-cli -m model-f16.gguf",
        "llama-server -m model-f16.gguf",
        "ollama create NAME",
        "lms import model-f16.gguf",
    )
    assert all(command in readme for command in commands)
    plain = export(saved(tmp_path / "other"), tmp_path / "plain", "safetensors")
    assert not {"Modelfile", "README.md"} & {path.name for path in plain.folder.iterdir()}


def test_a_quantised_folder_is_known_as_such_before_it_is_loaded(tmp_path: Path) -> None:
    made = quantize(saved(tmp_path / "base"), tmp_path)
    out = export(f"path:{made.folder}", tmp_path / "out", {"kind": "gguf", "types": ("q4_0",)}, "compressed_tensors")
    assert {"model-q4_0.gguf", "compressed-tensors/model.safetensors"} < set(out.summary["files"])
    assert "ollama create" in (out.folder / "README.md").read_text()


def test_two_formats_do_not_write_over_each_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"two of (its formats|them) write model-f16.gguf; leave one out"):
        export(saved(tmp_path / "base"), tmp_path / "export", "gguf", {"kind": "gguf", "name": "other"})


def test_every_format_says_what_it_refuses_before_any_is_written(tmp_path: Path) -> None:
    where = saved(tmp_path / "base", hidden_act="gelu")
    stage = potstill.Export(model=where, formats=("safetensors", {"kind": "gguf", "types": ("q4_0",)}))
    with pytest.raises(UserError) as error:
        potstill.run_stage(stage, into=tmp_path / "export")
    head, first, second = str(error.value).splitlines()
    assert head.endswith(": 2 problems")
    assert first.endswith("formats  the gguf exporter cannot express the activation 'gelu'; export 'safetensors' instead")
    assert "types name 'q4_0' but the model is not quantised" in second
    assert not list((tmp_path / "export").rglob("model*"))


def test_what_happened_to_the_layers_is_said(tmp_path: Path) -> None:
    layers = {
        "a": LayerError(0.1, 0.2, damping=0.1, dead_columns=3, rounded_rows=2),
        "b": LayerError(0.1, 0.2, damping=1.0, dead_columns=5),
        "c": LayerError(0.1, 0.2, damping=0.01, vanished=True),
    }
    assert notes_on(layers, 0.01) == [
        "damping raised in 2 of 3 layers, to 1 in 'b' (asked: 0.01): their calibration inputs depend on one another; "
        "calibrate on more rows",
        "8 inputs of 2 layers were zero in every calibration row, 5 of them in 'b': their weights are rounded to nearest",
        "2 outputs were rounded to nearest before sweeps: GPTQ was no better on the calibration rows",
        "all weights of 'c' became zero: they are too small for a float16 scale",
    ]
    assert notes_on({"c": LayerError(None, 0.2)}, 0.01) == []


def test_a_layer_of_tiny_weights_becomes_zero_and_is_named(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    model = tiny_model("qwen2", len(tokenizer), eos=tokenizer.eos_token_id)
    model.model.layers[1].mlp.up_proj.weight.data *= 1e-9
    save_model(model, tokenizer, tmp_path / "base")
    made = quantize(f"path:{tmp_path / 'base'}", tmp_path)
    assert (
        "all weights of 'model.layers.1.mlp.up_proj' became zero: they are too small for a float16 scale"
        in (made.summary["notes"])
    )
    assert {"damping", "dead_columns", "rounded_rows", "vanished"} < made.summary["layers"][0].keys()
