"""Four-bit weights."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from potstill.core.errors import Problem, UserError
from potstill.data.prompts import Renderer
from potstill.data.store import Counts, instruction_pairs
from potstill.edges.codes import weight_of
from potstill.edges.machine import float64_rate, resting_memory
from potstill.edges.models import PACKED, linears_in, load_model, load_tokenizer, save_dequantised, skeleton, stored_dtype
from potstill.quant.layers import LayerError, quantise_model, width_problems
from potstill.quant.packed import save_packed
from potstill.stages.base import Context, DataStage
from potstill.stages.cost import left_over
from potstill.stages.outlook import Cost, Outlook, Prospect, made_from
from potstill.stages.refs import ModelRef
from potstill.stages.training import sample_rows

PASSES = 5  # of a block: one for each set of layers that share inputs, and one to feed the next block


class Quantize(DataStage, kind="quantize"):
    """Quantise all linear layers but the head to 4 bits: GPTQ (Frantar et al., arXiv:2210.17323), or rounding as its control.

    Calibrated on training rows that went through the chat template, never on evaluation rows. The artifact holds the codes
    (`packed.safetensors`) and, so that everything can load it, the weights they stand for.
    """

    version: ClassVar[int] = 4  # 4: a dtype that `rest` names is obeyed; 3: what is not quantised in bf16

    model: ModelRef = Field(description="what is quantised")
    method: Literal["gptq", "rtn"] = Field(default="gptq", description="GPTQ, or round to nearest as a control")
    group: int = Field(
        default=32, description="weights that share a scale; a multiple of 32, so that GGUF's Q4_0 holds them exactly"
    )
    damping: float = Field(default=0.01, gt=0, le=1, description="share of the mean diagonal added to the Hessian")
    clip_search: bool = Field(default=False, description="search each group's scale for the least squared error")
    rest: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description="dtype of what is not quantised, which may round it; auto: as the model is stored, but bf16 for float32 "
        "weights that it holds exactly: the embeddings of a model that was trained in float32 stay in it",
    )
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
            found = outlook.model(self.model)
        except UserError as error:
            yield Problem("model", str(error), repr(str(self.model)))
            return
        if found is not None:
            yield from (Problem("group", rule) for rule in width_problems(found.config, self.group))

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
            seconds=PASSES * probe.forward_seconds(tokens) + self._solving(found) if probe is not None else None,
            memory_bytes=round(
                resting_memory() + left_over(size) + 8 * size.parameters + 24 * size.body / blocks + 8 * tokens * size.hidden
            ),
            output_bytes=round(size.body * (4 + 16 / self.group) / 8) + 4 * size.parameters,
            less_memory="lower rows",
            rows=(rows,),
        )

    def _solving(self, model: Prospect) -> float:
        """Seconds of the solver: in float64, per layer an inverse of its Hessian and an update of its rows for each column."""
        if self.method == "rtn":
            return 0.0
        shapes = [weight_of(layer).shape for layer in linears_in(skeleton(model.config).base_model).values()]
        products = sum(6 * inputs**3 + 4 * outputs * inputs**2 for outputs, inputs in shapes)
        return products / float64_rate()

    def closing(self, summary: dict[str, Any]) -> str:
        kept = f", {len(summary['kept'])} kept at full precision" if summary["kept"] else ""
        return f"{len(summary['layers'])} layers at {summary['bits_per_weight']:g} bits per weight{kept}"

    def _rest(self, where: str) -> Any:
        """The torch dtype of what is not quantised."""
        import torch

        named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        stored = stored_dtype(where, rest=True) or torch.float32
        return named.get(self.rest, torch.bfloat16 if stored == torch.float32 else stored)

    def run(self, context: Context) -> dict[str, Any]:
        import torch

        work, where = context.work, context.where(self.model)
        model, tokenizer = load_model(where), load_tokenizer(where)
        renderer = Renderer(tokenizer, self.prompts)
        rows = sample_rows(self.data, "train", self.rows)
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
        if not result.packed:
            raise UserError(
                f"{work.name}: no layer was quantised ({len(result.kept)} kept); calibrate on more rows, or set group"
            )
        quantised = {f"{name}.weight" for name in result.packed}
        rest, exact = self._rest(where), self.rest == "auto"
        save_dequantised(model, tokenizer, work.folder, renderer.stop_ids, quantised, rest, exact)
        save_packed(result.packed, work.folder / PACKED)
        notes = notes_on(result.errors, self.damping)
        for note in notes:
            work.note(note)
        return {
            "made_from": str(self.model),
            "method": self.method,
            "layers": [_layer(name, error) for name, error in result.errors.items()],
            "kept": list(result.kept),
            "notes": notes,
            "quantised_parameters": sum(packed.codes_OI.numel() for packed in result.packed.values()),
            "parameters": sum(p.numel() for p in model.parameters()),
            "bits_per_weight": 4 + 16 / self.group,
            "calibration_tokens": sum(map(len, pairs)),
        }


def _layer(name: str, error: LayerError) -> dict[str, Any]:
    figures = asdict(error)
    return {"name": name, "gptq_error": figures.pop("gptq"), "rtn_error": figures.pop("rtn"), **figures}


def notes_on(errors: Mapping[str, LayerError], damping: float) -> list[str]:
    """What a reader must know of how the layers were rounded, beyond their errors."""
    notes = []
    raised = {name: e.damping for name, e in errors.items() if e.damping is not None and e.damping > damping}
    if raised:
        worst = max(raised, key=lambda name: raised[name])
        notes.append(
            f"damping raised in {len(raised)} of {len(errors)} layers, to {raised[worst]:g} in '{worst}' (asked: {damping:g}): "
            "their calibration inputs depend on one another; calibrate on more rows"
        )
    dead = {name: e.dead_columns for name, e in errors.items() if e.dead_columns}
    if dead:
        worst = max(dead, key=lambda name: dead[name])
        notes.append(
            f"{sum(dead.values()):,} inputs of {len(dead)} layers were zero in every calibration row, "
            f"{dead[worst]:,} of them in '{worst}': their weights are rounded to nearest"
        )
    rounded = sum(e.rounded_rows for e in errors.values())
    if rounded:
        notes.append(f"{rounded:,} outputs are rounded to nearest, because GPTQ was no better on the calibration rows")
    vanished = [name for name, e in errors.items() if e.vanished]
    if vanished:
        first = f"'{vanished[0]}'" + (f" and {len(vanished) - 1} more" if len(vanished) > 1 else "")
        notes.append(f"all weights of {first} became zero: they are too small for a float16 scale")
    return notes
