"""Four-bit weights."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator

from potstill.core.errors import Problem, UserError
from potstill.data.prompts import Renderer
from potstill.data.store import Counts, instruction_pairs
from potstill.edges.machine import resting_memory
from potstill.edges.models import PACKED, load_model, load_tokenizer, save_model
from potstill.quant.layers import quantise_model
from potstill.quant.packed import save_packed
from potstill.stages.base import Context, DataStage
from potstill.stages.outlook import Cost, Outlook, Prospect, made_from
from potstill.stages.refs import ModelRef
from potstill.stages.training import drawn

PASSES = 5  # of a block: one for each set of layers that share inputs, and one to feed the next block


class Quantize(DataStage, kind="quantize"):
    """Quantise all linear layers but the head to 4 bits: GPTQ (Frantar et al., arXiv:2210.17323), or rounding as its control.

    Calibrated on training rows that went through the chat template, never on evaluation rows. The artifact holds the codes
    (`packed.safetensors`) and, so that everything can load it, the weights they stand for.
    """

    model: ModelRef = Field(description="what is quantised")
    method: Literal["gptq", "rtn"] = Field(default="gptq", description="GPTQ, or round to nearest as a control")
    group: int = Field(
        default=32, description="weights that share a scale; a multiple of 32, so that GGUF's Q4_0 holds them exactly"
    )
    damping: float = Field(default=0.01, gt=0, le=1, description="share of the mean diagonal added to the Hessian")
    clip_search: bool = Field(default=False, description="search each group's scale for the least squared error")
    rows: int = Field(default=128, ge=1, description="training rows to calibrate on")

    @field_validator("group")
    @classmethod
    def _whole_blocks(cls, group: int) -> int:
        if group < 32 or group % 32:
            raise ValueError("must be a multiple of 32, such as 32, 64 or 128")
        return group

    def reader(self) -> ModelRef:
        return self.model

    def problems(self, outlook: Outlook) -> Iterator[Problem]:
        yield from super().problems(outlook)
        try:
            outlook.model(self.model)
        except UserError as error:
            yield Problem("model", str(error), repr(str(self.model)))

    def prospect(self, outlook: Outlook) -> Prospect | None:
        return made_from(outlook.model(self.model), quantised=True)

    def cost(self, outlook: Outlook) -> Cost:
        found = outlook.model(self.model)
        if found is None:
            return Cost()
        size, rows = found.size, outlook.rows(self.data, self.prompts, self.model, "train")
        tokens = min(self.rows, rows.kept) * rows.tokens
        blocks = max(1, found.config.num_hidden_layers)
        probe = outlook.probe(found.config, rows)
        return Cost(
            parameters=size.parameters,
            tokens=round(tokens),
            seconds=PASSES * probe.forward_seconds(tokens) if probe is not None else None,
            memory_bytes=round(resting_memory() + 5 * size.parameters + 8 * 3 * size.body / blocks + 8 * tokens * size.hidden),
            output_bytes=round(size.body * (4 + 16 / self.group) / 8) + 4 * size.parameters,
            less_memory="lower rows",
            rows=(rows,),
        )

    def closing(self, summary: dict[str, Any]) -> str:
        kept = f", {len(summary['kept'])} kept at full precision" if summary["kept"] else ""
        return f"{len(summary['layers'])} layers at {summary['bits_per_weight']:g} bits per weight{kept}"

    def run(self, context: Context) -> dict[str, Any]:
        import torch

        work, where = context.work, context.where(self.model)
        model, tokenizer = load_model(where), load_tokenizer(where)
        renderer = Renderer(tokenizer, self.prompts)
        rows = drawn(self.data, "train", self.rows)
        pairs = [[*prompt, *response] for prompt, response in instruction_pairs(rows, renderer, Counts())]
        if not pairs:
            raise UserError(f"{work.name}: no training row fits prompts.max_tokens to calibrate on")
        pairs.sort(key=len)
        batches = []
        for begin in range(0, len(pairs), 16):
            batch = pairs[begin : begin + 16]
            ids_BT = torch.zeros((len(batch), len(batch[-1])), dtype=torch.long)
            mask_BT = torch.zeros_like(ids_BT)
            for b, ids in enumerate(batch):
                ids_BT[b, : len(ids)] = torch.tensor(ids)
                mask_BT[b, : len(ids)] = 1
            batches.append({"input_ids": ids_BT.to(model.device), "attention_mask": mask_BT.to(model.device)})
        result = quantise_model(
            model,
            batches,
            method=self.method,
            group=self.group,
            damping=self.damping,
            clip_search=self.clip_search,
            on_layer=lambda name, i, n, error: work.progress.update(
                i + 1, n, "layer", error=f"{error:.1e}" if error is not None else "kept"
            ),
        )
        save_model(model, tokenizer, work.folder, renderer.stop_ids)
        save_packed(result.packed, work.folder / PACKED)
        quantised = sum(packed.codes_OI.numel() for packed in result.packed.values())
        return {
            "made_from": str(self.model),
            "method": self.method,
            "layers": [{"name": name, "gptq_error": e.gptq, "rtn_error": e.rtn} for name, e in result.errors.items()],
            "kept": list(result.kept),
            "quantised_parameters": quantised,
            "parameters": sum(p.numel() for p in model.parameters()),
            "bits_per_weight": 4 + 16 / self.group,
            "calibration_tokens": sum(map(len, pairs)),
        }
