"""A plain folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load."""

import copy
from pathlib import Path
from typing import Any, Literal

from potstill.core.errors import UserError
from potstill.exporters import Exporter


class Safetensors(Exporter, kind="safetensors"):
    """Weights, configuration and tokenizer as transformers writes them.

    A quantised model is written with its dequantised weights in float32, the only type here that holds them exactly:
    the folder answers just as the GGUF's grid does, and is no smaller than before.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as the model is

    def write(self, model: Any, tokenizer: Any, packed: Any, folder: Path) -> list[Path]:
        import torch

        if packed and self.dtype not in ("auto", "float32"):
            raise UserError(
                f"the safetensors exporter's dtype = '{self.dtype}' cannot hold quantised weights exactly; "
                "use 'auto' or 'float32', or export 'gguf' for a small file"
            )
        dtype = model.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        if dtype != model.dtype:
            model = copy.deepcopy(model).to(dtype)  # a copy: the exporters after this one want the model as it was
        before = set(folder.iterdir())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return sorted(set(folder.iterdir()) - before)
