"""GPTQModel's GPTQ, four bits in symmetric groups of 32.

Calibrates on one row after another, without padding, its default. Its other defaults: a damping of 5 % of the mean diagonal,
groups whose scale is found when the solver reaches them, columns ordered by activation inside a group and groups among
themselves (`act_group_aware`). `act_order` is the published order over all columns: groups are made in that order,
so a file says of each column which group it is in. `static` finds groups and scales before, as potstill does.

Its time includes packing. It builds an extension on its first run: run it once before timing it. Layers stay in
memory, which by default it would move to disk as they are done.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _peer import GPTQ_PARTS, Used, read_gptq, run, stored_bits

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores or fewer it fails to build its pool of threads otherwise
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "act_order": {"desc_act": True, "act_group_aware": False},
    "static": {"desc_act": True, "act_group_aware": False, "static_groups": True},
    "mse": {"mse": 2.4},
    "damp1": {"damp_percent": 0.01},
    "static_damp1": {"desc_act": True, "act_group_aware": False, "static_groups": True, "damp_percent": 0.01},
    "act_order_mse": {"desc_act": True, "act_group_aware": False, "mse": 2.4},
    "gptaq": {"gptaq": {"alpha": 0.25}},
    "foem": {"foem": {"alpha": 0.25, "beta": 0.2}},
}


def quantise(model: str, rows: list[list[int]], setting: Mapping[str, Any], out: Path) -> tuple[Used, Any, int]:
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=32, sym=True, offload_to_disk=False, **setting)
    loaded = GPTQModel.load(model, config, dtype=torch.float32, device="cpu")
    data = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)} for row in rows]
    with Used() as used:
        loaded.quantize(data, batch_size=1, calibration_data_min_length=1, backend=BACKEND.GPTQ_TORCH)
    loaded.save(str(out))
    return used, read_gptq(out), stored_bits(out, GPTQ_PARTS)


if __name__ == "__main__":
    run("gptqmodel", quantise, SETTINGS)
