"""Weights of four or eight bits."""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from potstill.core.errors import Problem, UserError
from potstill.data.prompts import Renderer
from potstill.data.store import Counts, Pair, instruction_pairs
from potstill.edges.codes import weight_of
from potstill.edges.machine import float64_rate, resting_memory
from potstill.edges.models import PACKED, linears_in, load_model, load_tokenizer, save_dequantised, skeleton, stored_dtype
from potstill.quant.finished import Finished, LayerError
from potstill.quant.forwards import Batch
from potstill.quant.layers import AT_ONCE, EMBEDDING_GROUP, quantise_model, width_problems
from potstill.quant.packed import Packed, save_packed
from potstill.stages.base import Context, DataStage
from potstill.stages.cost import left_over
from potstill.stages.outlook import Cost, Outlook, Prospect, made_from
from potstill.stages.refs import ModelRef
from potstill.stages.training import sample_rows

PASSES = 1.1  # of a block: one, and of its first batch one more


class Quantize(DataStage, kind="quantize"):
    """Quantise all linear layers but the head to 4 or 8 bits: GPTQ (Frantar et al., arXiv:2210.17323), or rounding alone.

    Calibrated on training rows that went through the chat template, never on evaluation rows. The artifact holds the codes
    (`packed.safetensors`) and, so that everything can load it, the weights they stand for.
    """

    version: ClassVar[int] = 6  # 6: each layer finds how much it makes up for; 5: by activation, sweeps; 4: `rest` is obeyed

    model: ModelRef = Field(description="what is quantised")
    method: Literal["gptq", "rtn"] = Field(default="gptq", description="GPTQ, or round to nearest as a control")
    bits: Literal[4, 8] = Field(default=4, description="of a weight")
    group: int = Field(
        default=32, description="weights that share a scale; a multiple of 32, so that GGUF's Q4_0 and Q8_0 hold them exactly"
    )
    damping: float = Field(default=0.01, gt=0, le=1, description="share of the mean diagonal added to the Hessian")
    make_up: bool = Field(
        default=True,
        description="gptq: a layer makes up for what all layers before did wrong, as far as one half of the calibration rows "
        "says the same as the other; about twice the time",
    )
    clip_search: bool = Field(
        default=False, description="gptq: search each group's first scale for the least error, by the inputs' size"
    )
    sweeps: int = Field(
        default=4, ge=0, description="gptq: passes that set each scale and each code to its best value given all others"
    )
    response_weight: float = Field(
        default=1.0, gt=0, description="how much a position that predicts a response token counts, one of the prompt being 1"
    )
    embeddings: Literal["keep", "8bit"] = Field(
        default="keep", description="embeddings and head: as `rest` says, or rounded to 8 bits, which GGUF's Q8_0 holds exactly"
    )
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
            if self.embeddings != "keep" and found.size.hidden % EMBEDDING_GROUP:
                rule = f"a width of {found.size.hidden} does not divide into groups of {EMBEDDING_GROUP}; leave it out"
                yield Problem("embeddings", rule, repr(self.embeddings))

    def prospect(self, outlook: Outlook) -> Prospect | None:
        return made_from(outlook.model(self.model), bits=self.bits)

    def cost(self, outlook: Outlook) -> Cost:
        found = outlook.model(self.model)
        if found is None:
            return Cost()
        size, rows = found.size, outlook.rows(self.data, self.prompts, self.model, "train")
        tokens = min(self.rows, rows.kept) * rows.tokens
        probe = outlook.probe(found.config, rows)
        runs, widest = (2 if self._makes_up else 1), max(inputs for _, inputs in _shapes(found))
        sums = (9 if self._makes_up else 4) * 8 * widest**2  # of what the widest layer reads
        waiting = runs * 4 * tokens * (2 * size.hidden + widest)  # forwards on all batches
        return Cost(
            parameters=size.parameters,
            tokens=round(tokens),
            seconds=runs * PASSES * probe.forward_seconds(tokens) + self._solving(found, tokens) if probe else None,
            memory_bytes=round(
                resting_memory() + left_over(size) + 8 * size.parameters + sums + waiting + 10 * 8 * AT_ONCE["cpu"]
            ),
            output_bytes=round(size.body * (self.bits + 16 / self.group) / 8) + 4 * size.parameters,
            less_memory="lower rows",
            rows=(rows,),
        )

    @property
    def _makes_up(self) -> bool:
        return self.method == "gptq" and self.make_up

    def _solving(self, model: Prospect, tokens: float) -> float:
        """Seconds of the solver: sums of products in float32, and in float64 each layer's factors of its Hessians, its columns
        and what three sets of codes do to its outputs; sweeps in float32, at half the time.
        """
        if self.method == "rtn":
            return 0.0
        sums, factors, products = (1.6, 3, 12 + self.sweeps) if self.make_up else (0.6, 1, 6 + self.sweeps)
        shapes, single = _shapes(model), 2  # as long again goes into steps of one column
        flops = sum(sums * tokens * i**2 + single * (factors * i**3 / 3 + products * o * i**2) for o, i in shapes)
        return flops / float64_rate()

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
        work, where = context.work, context.where(self.model)
        model, tokenizer = load_model(where), load_tokenizer(where)
        renderer = Renderer(tokenizer, self.prompts)
        rows = sample_rows(self.data, "train", self.rows)
        pairs = list(instruction_pairs(rows, renderer, Counts()))
        if not pairs:
            raise UserError(f"{work.name}: no training row fits prompts.max_tokens to calibrate on")
        finished = Finished(work.folder / "blocks")
        result = quantise_model(
            model,
            batches_of(pairs, self.response_weight, model.device),
            method=self.method,
            bits=self.bits,
            group=self.group,
            make_up=self.make_up,
            embeddings=self.embeddings == "8bit",
            finished=finished,
            on_layer=lambda name, i, n, error: work.progress.update(
                i, n, "layer", error=f"{error:.1e}" if error is not None else "kept"
            ),
            damping=self.damping,
            clip_search=self.clip_search,
            sweeps=self.sweeps,
        )
        if not result.errors:
            raise UserError(
                f"{work.name}: no layer was quantised ({len(result.kept)} kept); calibrate on more rows, or set group"
            )
        quantised = {f"{name}.weight" for name in result.packed}
        rest, exact = self._rest(where), self.rest == "auto"
        save_dequantised(model, tokenizer, work.folder, renderer.stop_ids, quantised, rest, exact)
        save_packed(result.packed, work.folder / PACKED)
        shutil.rmtree(finished.folder)
        tokens = sum(len(prompt) + len(response) for prompt, response in pairs)
        widest = max(result.packed[name].codes_OI.shape[1] for name in result.errors)
        notes = [*notes_on(result.errors, self.damping), *_too_few(tokens, widest)]
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
            "bits_per_weight": _bits_per_weight(result.packed.values()),
            "calibration_tokens": tokens,
        }


def _shapes(model: Prospect) -> list[tuple[int, int]]:
    """[out, in] of every layer that is quantised."""
    weights = [weight_of(layer) for layer in linears_in(skeleton(model.config).base_model).values()]
    return [(weight_OI.shape[0], weight_OI.shape[1]) for weight_OI in weights]


def _bits_per_weight(packed: Iterable[Packed]) -> float:
    """Of all quantised matrices together: codes and float16 scales."""
    sizes = [(matrix.codes_OI.numel(), matrix.bits + 16 / matrix.group) for matrix in packed]
    return sum(count * bits for count, bits in sizes) / sum(count for count, _ in sizes)


def batches_of(pairs: Sequence[Pair], response_weight: float, device: Any, size: int = 8) -> list[Batch]:
    """Rows of like length side by side, padded on the right, and how much each of their positions counts."""
    import torch

    batches = []
    rows = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
    for begin in range(0, len(rows), size):
        batch = [(len(prompt), torch.tensor([*prompt, *response])) for prompt, response in rows[begin : begin + size]]
        ids_BT = torch.zeros((len(batch), len(batch[-1][1])), dtype=torch.long)
        mask_BT, weight_BT = torch.zeros_like(ids_BT), torch.zeros(ids_BT.shape)
        for b, (prompt, ids) in enumerate(batch):
            ids_BT[b, : len(ids)], mask_BT[b, : len(ids)], weight_BT[b, : len(ids)] = ids, 1, 1
            weight_BT[b, max(prompt - 1, 0) : len(ids) - 1] = response_weight  # the last token predicts nothing
        made = {"input_ids": ids_BT, "attention_mask": mask_BT} | ({"weight": weight_BT} if response_weight != 1 else {})
        batches.append({name: values.to(device) for name, values in made.items()})
    return batches


def _too_few(tokens: int, widest: int) -> Iterator[str]:
    """A calibration whose Hessians cannot have full rank, in a figure."""
    if tokens < widest:
        yield (
            f"{tokens:,} calibration tokens for inputs up to {widest:,} wide: the Hessians rest on damping, and what they do "
            "not see is left to chance; calibrate on more rows"
        )


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
        notes.append(f"{rounded:,} outputs were rounded to nearest before sweeps: GPTQ was no better on the calibration rows")
    vanished = [name for name, e in errors.items() if e.vanished]
    if vanished:
        first = f"'{vanished[0]}'" + (f" and {len(vanished) - 1} more" if len(vanished) > 1 else "")
        notes.append(f"all weights of {first} became zero: they are too small for a float16 scale")
    return notes
