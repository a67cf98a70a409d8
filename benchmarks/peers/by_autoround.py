"""auto-round, four bits in symmetric groups of 32: codes and clipping learned block by block by the signs of gradients.

It takes rows of one length only, so rows are padded to the longest; its loss leaves padding out, and with it tokens that equal
the padding token. `default` is its 200 steps of 8 rows, `light` its preset of 50 steps, both in its mixed precision of
bfloat16. Each block learns to give the outputs of full precision on the inputs that quantised blocks give. `opt_rtn`
learns nothing, but searches scales. Its presets ask for 128 rows of 2,048 tokens; here it gets the rows of all.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _peer import GPTQ_PARTS, Used, read_gptq, run, stored_bits

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"iters": 200},
    "light": {"iters": 50, "lr": 5e-3},
    "opt_rtn": {"iters": 0},
}


def quantise(model: str, rows: list[list[int]], setting: Mapping[str, Any], out: Path) -> tuple[Used, Any, int]:
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, loaded = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    longest = max(map(len, rows))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    ids_NT = torch.full((len(rows), longest), tokenizer.pad_token_id)
    mask_NT = torch.zeros_like(ids_NT)
    for n, row in enumerate(rows):
        ids_NT[n, : len(row)], mask_NT[n, : len(row)] = torch.tensor(row), 1
    data = [{"input_ids": ids_NT[[n]], "attention_mask": mask_NT[[n]]} for n in range(len(rows))]
    by = AutoRound(
        loaded,
        tokenizer,
        scheme="W4A16",
        group_size=32,
        sym=True,
        dataset=data,
        nsamples=len(rows),
        seqlen=longest,
        batch_size=8,
        enable_torch_compile=False,
        device_map="cpu",
        **setting,
    )
    with Used() as used:
        made, _ = by.quantize()
    in_memory = {name: layer.weight.detach().float() for name, layer in made.named_modules() if hasattr(layer, "scale")}
    by.save_quantized(str(out), format="auto_gptq")
    tensors = read_gptq(out)
    for name, weight_OI in in_memory.items():
        if not torch.allclose(tensors[f"{name}.weight"], weight_OI, rtol=2**-7, atol=1e-6):  # in memory it is bfloat16
            raise SystemExit(f"{name}: its file holds other weights than the model in memory")
    return used, tensors, stored_bits(out, GPTQ_PARTS)


if __name__ == "__main__":
    run("auto-round", quantise, SETTINGS)
