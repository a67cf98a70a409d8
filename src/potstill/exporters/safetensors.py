"""A plain folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from potstill.edges.models import as_dtype
from potstill.exporters import Exporter
from potstill.exporters._ends import end_ids


class Safetensors(Exporter, kind="safetensors"):
    """Weights, configuration and tokenizer as transformers writes them.

    A quantised model is written with its dequantised weights in float32, the only type here that holds them exactly:
    the folder answers just as the GGUF's grid does, and is no smaller than before.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the weights; auto: as the model is stored"
    )

    def problems(self, config: Any, tokenizer: Any, *, quantised: int) -> list[str]:
        if not quantised or self.dtype in ("auto", "float32"):
            return []
        return [
            f"the safetensors exporter's dtype = '{self.dtype}' cannot hold quantised weights exactly; "
            "use 'auto' or 'float32', or export 'gguf' for a small file"
        ]

    def holds(self, stored: str, *, quantised: int) -> dict[str, str]:
        return {"model.safetensors": stored if self.dtype == "auto" else self.dtype}

    def write_files(self, model: Any, tokenizer: Any, packed: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
        import torch

        written = model if self.dtype == "auto" else as_dtype(model, getattr(torch, self.dtype))
        written = copy.copy(written)  # shallow: only the generation config differs from the caller's
        written.generation_config = copy.deepcopy(model.generation_config)
        written.generation_config.eos_token_id = end_ids(model, tokenizer)
        written.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return sorted(path for path in folder.rglob("*") if path.is_file())
