"""A folder of four-bit weights in the format that transformers and vLLM load: compressed-tensors, pack-quantized."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potstill.core.artifact import read_json, write_json
from potstill.core.errors import UserError
from potstill.exporters import Exporter
from potstill.exporters._ends import end_ids

FOLDER = "compressed-tensors"
_BITS = 4


class CompressedTensors(Exporter, kind="compressed_tensors"):
    """Writes the folder `compressed-tensors/` with a quantised model's codes and float16 scales; nothing is quantised again.

    transformers loads it where the package `compressed-tensors` is installed, and computes in the dtype of its config,
    float32, in which code times scale is exact. With `CompressedTensorsConfig(dequantize=True)` it multiplies in float16 and
    rounds. Weights that are not four-bit are stored in 16 bits where these hold them exactly, else in float32.
    """

    def problems(self, config: Any, tokenizer: Any, *, quantised: int) -> list[str]:
        if quantised != _BITS:
            is_not = f"is quantised to {quantised} bits; export 'gguf'" if quantised else "is not quantised; quantise it first"
            return [f"the compressed_tensors exporter writes four-bit weights, and the model {is_not}"]
        if config.model_type == "gpt2":
            return ["the compressed_tensors exporter knows linear layers, not GPT-2's transposed ones; export 'safetensors'"]
        return []

    def holds(self, stored: str, *, quantised: int) -> dict[str, str]:
        return {f"{FOLDER}/model.safetensors": "float32"}

    def write_files(self, model: Any, tokenizer: Any, packed: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
        from safetensors.torch import save_file

        into = folder / FOLDER
        into.mkdir()
        packed = {layer: matrix for layer, matrix in packed.items() if matrix.bits == _BITS}  # embeddings may have more
        groups = {matrix.group for matrix in packed.values()}
        if len(groups) > 1:
            raise UserError(f"its layers have groups of {sorted(groups)} columns, and compressed_tensors is written with one")
        model.config.save_pretrained(into)
        write_json(into / "config.json", read_json(into / "config.json") | _config(model, packed, groups.pop()))
        generation = copy.deepcopy(model.generation_config)
        generation.eos_token_id = end_ids(model, tokenizer)
        generation.save_pretrained(into)
        tokenizer.save_pretrained(into)
        save_file(_tensors(model, packed), into / "model.safetensors", metadata={"format": "pt"})
        return sorted(path for path in into.rglob("*") if path.is_file())


def pack_int32(codes_OI: Any) -> Any:
    """int8 codes −8 … 7 [out, in] as int32 [out, in / 8]: code + 8, the first of eight columns in the lowest four bits."""
    import torch

    assert codes_OI.shape[1] % 8 == 0  # groups are multiples of 32 columns
    nibbles_OJE = (codes_OI + 8).to(torch.int64).unflatten(1, (-1, 8))
    words_OJ = (nibbles_OJE << (4 * torch.arange(8))).sum(-1)
    return words_OJ.to(torch.int32)  # the top bit becomes the sign


def _tensors(model: Any, packed: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {}
    for name, parameter in model.named_parameters():  # a tied head is named once, as the embedding
        matrix = packed.get(name.removesuffix(".weight"))
        if matrix is None:
            found[name] = _smallest(parameter.detach().float().cpu()).contiguous()
            continue
        found[f"{name}_packed"] = pack_int32(matrix.codes_OI.cpu())
        found[f"{name}_scale"] = matrix.scales_OG.cpu().contiguous()
        found[f"{name}_shape"] = torch.tensor(matrix.codes_OI.shape)
    return found


def _smallest(values: Any) -> Any:
    """The values in the smallest type that holds all of them exactly."""
    import torch

    narrow = (values.to(dtype) for dtype in (torch.bfloat16, torch.float16))
    return next((stored for stored in narrow if stored.float().equal(values)), values)


def _config(model: Any, packed: Mapping[str, Any], group: int) -> dict[str, Any]:
    """What config.json says besides the model's own: the format, and which layers are as they were."""
    from potstill.edges.models import linears_in

    weights = {"num_bits": _BITS, "type": "int", "symmetric": True, "strategy": "group", "group_size": group, "dynamic": False}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": [name for name in linears_in(model) if name not in packed],
    }
    return {"architectures": [type(model).__name__], "dtype": "float32", "quantization_config": quantization}
