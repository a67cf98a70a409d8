"""What the fields of `quantize` do to its artifact and to the file that is exported of it."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tiny_parts import save_pair, write_rows

from potstill.core.artifact import Artifact
from potstill.core.errors import RecipeError
from potstill.edges.models import bits_of, load_model
from potstill.quant.packed import packed_of
from potstill.recipe.parse import parse_recipe
from potstill.run.runner import run_recipe
from potstill.stages.quantize import batches_of


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fields")
    save_pair(folder, student=32, teacher=48)
    write_rows(folder / "rows.jsonl")
    return folder


def run(root: Path, folder: Path, *more: dict[str, Any], model: str = "student", **fields: Any) -> dict[str, Artifact]:
    data = {"kind": "jsonl", "path": str(root / "rows.jsonl"), "language": "en", "splits": {"validation": 0.2, "test": 0.3}}
    prompts = {"max_tokens": 128, "max_prompt_tokens": 96}
    small = {"name": "small", "kind": "quantize", "model": f"path:{root}/{model}", "rows": 8, **fields}
    return run_recipe(parse_recipe({"name": "fields", "data": data, "prompts": prompts, "stage": [small, *more]}), folder)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_file_holds_every_matrix_as_it_was_measured(root: Path, tmp_path: Path, bits: int) -> None:
    export = {"name": "file", "kind": "export", "model": "stage:small", "formats": [{"kind": "gguf"}]}
    made = run(root, tmp_path, export, bits=bits, embeddings="8bit")
    where = f"path:{made['small'].folder}"
    model = load_model(where)
    packed = packed_of(model, where)  # refuses weights that codes do not stand for
    assert bits_of(where) == bits
    assert {matrix.bits for name, matrix in packed.items() if "embed" in name} == {8}
    sizes = [(matrix.codes_OI.numel(), matrix.bits + 0.5) for matrix in packed.values()]
    mean = sum(count * of_one for count, of_one in sizes) / sum(count for count, _ in sizes)
    assert made["small"].summary["bits_per_weight"] == pytest.approx(mean)
    assert bits + 0.5 <= mean <= 8.5
    (file,) = made["file"].folder.glob("*.gguf")
    assert file.name == f"model-q{bits}_0.gguf"
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    wanted = {"token_embd.weight": model.model.embed_tokens, "blk.1.ffn_down.weight": model.model.layers[1].mlp.down_proj}
    for name, layer in wanted.items():
        values = gguf.dequantize(stored[name].data, stored[name].tensor_type)
        assert torch.equal(torch.from_numpy(values.copy()), layer.weight.detach()), name
    assert {t.tensor_type.name for t in stored.values()} == {"F32", "Q8_0", f"Q{bits}_0"}


def test_too_few_calibration_tokens_are_told_in_a_figure(root: Path, tmp_path: Path) -> None:
    few, enough = run(root, tmp_path / "few", rows=1)["small"], run(root, tmp_path / "enough")["small"]
    tokens = few.summary["calibration_tokens"]
    assert tokens < 64 < enough.summary["calibration_tokens"]
    assert any(note.startswith(f"{tokens} calibration tokens for inputs up to 64 wide") for note in few.summary["notes"])
    assert not any("calibration tokens for" in note for note in enough.summary["notes"])


def test_what_kept_blocks_is_gone_once_it_is_done(root: Path, tmp_path: Path) -> None:
    assert not (run(root, tmp_path)["small"].folder / "blocks").exists()


def test_embeddings_that_do_not_divide_are_refused_before_the_cost(root: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"embeddings.*a width of 48 does not divide into groups of 32; leave it out"):
        run(root, tmp_path, model="teacher", embeddings="8bit")


def test_positions_that_predict_a_response_count_more() -> None:
    (batch,) = batches_of([([5, 6, 7], [8, 9]), ([1], [2])], 3.0, "cpu")
    assert batch["input_ids"].tolist() == [[1, 2, 0, 0, 0], [5, 6, 7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["weight"].tolist() == [[3, 1, 0, 0, 0], [1, 1, 3, 3, 1]]
    assert "weight" not in batches_of([([5], [8])], 1.0, "cpu")[0]
