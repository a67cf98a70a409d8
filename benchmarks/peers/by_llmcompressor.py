"""llm-compressor's GPTQ, four bits in symmetric groups of 32.

Calibrates on one row after another, without padding, its default; each block on what the quantised blocks before it give. Its
other defaults: a damping of 1 % of the mean diagonal, columns ordered by activation with groups left in place
(`actorder="static"`), and all layers of a block calibrated in one pass, before any of them is quantised.

Of a float32 model it keeps scales in float32, which would be half a bit per weight more than the other ways have. They are
rounded to float16 here, as it keeps them of a model in float16; that moves weights by at most 5·10⁻⁴ of themselves.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _peer import Used, run, stored_bits

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "mse": {"observer": "memoryless_mse"},
    "imatrix": {"observer": "imatrix_mse"},
    "in_order": {"actorder": None},
}


def quantise(model: str, rows: list[list[int]], setting: Mapping[str, Any], out: Path) -> tuple[Used, Any, int]:
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    observer = {"observer": setting["observer"]} if "observer" in setting else {}
    four = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32, **observer)
    scheme = {"four": QuantizationScheme(targets=["Linear"], weights=four)}
    order = {"actorder": setting["actorder"]} if "actorder" in setting else {}
    data = [{"input_ids": torch.tensor(row), "attention_mask": torch.ones(len(row), dtype=torch.long)} for row in rows]
    with Used() as used:
        oneshot(
            model=loaded,
            dataset=DataLoader(data, batch_size=1),
            recipe=GPTQModifier(config_groups=scheme, ignore=["lm_head"], **order),
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,
        )
    tensors = {}
    for name, layer in loaded.named_modules():
        if getattr(layer, "quantization_scheme", None) is not None and hasattr(layer, "weight_scale"):
            scale_OG = layer.weight_scale.detach().float()
            codes_OI = (layer.weight.detach().float() / scale_OG.repeat_interleave(32, 1)).round()
            if not torch.allclose(codes_OI * scale_OG.repeat_interleave(32, 1), layer.weight.float(), rtol=1e-5, atol=1e-7):
                raise SystemExit(f"{name}: its weights are no codes times its scales")
            tensors[f"{name}.weight"] = codes_OI * scale_OG.half().float().repeat_interleave(32, 1)
    loaded.half().save_pretrained(str(out), save_compressed=True)
    return used, tensors, stored_bits(out, (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_g_idx"))


if __name__ == "__main__":
    run("llmcompressor", quantise, SETTINGS)
