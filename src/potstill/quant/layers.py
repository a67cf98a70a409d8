"""Walking a language model's blocks and rounding every linear layer on the inputs it will really see."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from potstill.core.errors import UserError, told_of
from potstill.edges.codes import weight_of
from potstill.edges.experts import refuse_experts
from potstill.edges.models import blocks_of, linears_in, matrices_in, skeleton
from potstill.quant.finished import Finished, LayerError, Quantised
from potstill.quant.forwards import Batch, Forwards, block_inputs, evaluating, positions
from potstill.quant.gptq import joined, rounded, solve
from potstill.quant.hessian import curvature
from potstill.quant.making_up import Reads
from potstill.quant.packed import Packed
from potstill.quant.rounding import NotDivisible, refuse, round_to_nearest

EMBEDDING_GROUP = 32  # a block of GGUF's Q8_0
AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 24}  # weights solved side by side: more memory, but fewer steps that each cost a launch


OnLayer = Callable[[str, int, int, float | None], None]


@torch.no_grad()
def quantise_model(
    model: Any,
    batches: Sequence[Batch],
    *,
    method: Literal["gptq", "rtn"] = "gptq",
    bits: int = 4,
    group: int = 32,
    make_up: bool = True,
    damping: float = 0.01,
    by_activation: bool = True,
    embeddings: bool = False,
    finished: Finished | None = None,
    on_layer: OnLayer = lambda name, i, n, error: None,
    **settings: Any,
) -> Quantised:
    """Round every linear layer inside the decoder blocks, in place, first block first; the head stays, unless asked for.

    Layers that read the same tensor (q, k, v; then o; then gate, up; then down) are solved together, after all
    layers before them hold their rounded weights, so each one meets the inputs that it will meet in use. All this takes one
    forward of each block on each batch, and one more on the first batch.

    Args:
        model: a transformers causal language model; becomes float32.
        batches: `input_ids` and `attention_mask`, both [B, T], padded on the right; padding enters no Hessian. `weight`, of
            the same shape, says how much each position counts; default: all alike.
        method: "rtn" rounds to nearest; its errors are measured on its own inputs.
        make_up: solve each layer for what makes up for the errors of all layers before, as far as that holds on other rows, see
            `making_up`. The model of full precision then runs beside the quantised one.
        damping, by_activation: of `curvature`.
        embeddings: round embeddings and head to the nearest of 8 bits, before anything else.
        finished: where each block's codes are kept once it is solved; those that are there already are taken as they are.
        on_layer: called with (name, index from 1, number of layers, its relative output error or None where kept).
        settings: of `solve`.

    Raises:
        UserError: a mixture of experts, no decoder blocks where they are looked for, no batches, inputs that are not finite, or
            layers that cannot be solved; names them.
    """
    check_layers(model)
    model.float()  # codes times scales are exact in float32 and in nothing smaller
    blocks = blocks_of(model)
    names = {module: name for name, module in model.named_modules()}
    layers = {module: names[module] for block in blocks for module in linears_in(block).values()}
    rounding = _Rounding(method, bits, group, make_up, damping, by_activation, settings)
    result, done = Quantised(), 0
    with evaluating(model):
        beside = block_inputs(model, blocks, batches) if rounding.makes_up else None  # of the model of full precision
        if embeddings:
            result.packed |= round_embeddings(model)
        inputs = block_inputs(model, blocks, batches)
        for number, block in enumerate(blocks):
            here = {layers[layer]: layer for layer in linears_in(block).values()}
            forwards = Forwards(block, inputs.of(number), beside.of(number) if beside is not None else None)
            known = finished.read(number) if finished is not None else None
            if known is not None:
                _hold(known.packed, here)
                on_layer([*here][-1], done + len(here), len(layers), None)
            else:
                known = Quantised()
                for some in _solved(forwards, batches, layers, rounding):
                    _hold(some.packed, here)
                    known.add(some)
                    for name in [*some.errors, *some.kept]:
                        done += 1
                        on_layer(name, done, len(layers), known.error(name))
                if finished is not None:
                    finished.write(number, known)
            result.add(known)
            done = len(result.errors) + len(result.kept)
            inputs.hidden, exact = forwards.ended()
            if beside is not None:
                beside.hidden = exact
            del forwards  # and all that its frames hold
    result.kept += [name for name in layers.values() if name not in result.packed and name not in result.kept]
    return result


def _hold(packed: Mapping[str, Packed], layers: Mapping[str, nn.Module]) -> None:
    for name, matrix in packed.items():
        weight_of(layers[name]).copy_(matrix.dequantise())


def _solved(
    forwards: Forwards, batches: Sequence[Batch], names: Mapping[nn.Module, str], rounding: "_Rounding"
) -> Iterator[Quantised]:
    """One block's layers, those that share inputs together; ask for the next when these hold what was made of them."""
    for shared in forwards.sharing_inputs():
        weights = {names[layer]: weight_of(layer) for layer in shared}
        try:
            for name, weight_OI in weights.items():
                with told_of(name):
                    refuse(weight_OI, rounding.group, rounding.bits)
        except NotDivisible:
            yield Quantised(kept=list(weights))
            continue
        with told_of(", ".join(weights)):
            made = rounding.round(weights, _read(forwards, batches, shared[0], rounding.makes_up))
        yield made


def _read(forwards: Forwards, batches: Sequence[Batch], layer: nn.Module, drifts: bool) -> Reads:
    """What this layer reads at every position that is not padding."""
    reads = Reads(weight_of(layer).shape[1], drifts)
    for batch, (x, exact) in zip(batches, forwards.until(layer), strict=True):
        for half, rows in enumerate(reads.halves):
            x_NI, weights_N = positions(x, batch, rows)
            reads.add(half, x_NI, weights_N, positions(exact, batch, rows)[0] if exact is not None else None)
    return reads


@dataclass(frozen=True)
class _Rounding:
    """How layers are rounded; see `quantise_model`."""

    method: str
    bits: int
    group: int
    make_up: bool
    damping: float
    by_activation: bool
    settings: Mapping[str, Any]

    @property
    def makes_up(self) -> bool:
        return self.method == "gptq" and self.make_up

    def round(self, weights: Mapping[str, Tensor], reads: Reads) -> Quantised:
        """Matrices that read the same inputs. Errors are those of their own outputs at full precision on these inputs, whatever
        codes are solved for.
        """
        whole_OI = torch.cat(list(weights.values()))
        read = reads.all(whole_OI, self.damping)
        curved = curvature(read.hessian_II, self.damping, self.by_activation) if self.method == "gptq" else None
        some = max(1, AT_ONCE["cpu" if read.hessian_II.device.type == "cpu" else "cuda"] // whole_OI.shape[1])
        parts = []
        for weight_OI in whole_OI.to(read.hessian_II.device).split(some):
            if curved is None:
                parts.append(rounded(weight_OI, read.hessian_II, bits=self.bits, group=self.group))
                continue
            wanted_OI = read.wanted(weight_OI, curved)
            parts.append(solve(weight_OI, curved, bits=self.bits, group=self.group, wanted_OI=wanted_OI, **self.settings))
        made, solved, first = Quantised(), joined(parts), 0
        dead_columns = int((read.hessian_II.diagonal() == 0).sum())
        for name, weight_OI in weights.items():
            rows, first = solved.rows(slice(first, first + len(weight_OI))), first + len(weight_OI)
            made.packed[name] = rows.packed.cpu()
            made.errors[name] = LayerError(
                gptq=rows.share(rows.error_O) if curved is not None else None,
                rtn=rows.share(rows.nearest_O),
                damping=curved.damping if curved is not None else None,
                made_up=read.share,
                dead_columns=dead_columns,
                rounded_rows=int(rows.rounded_O.sum()),
                vanished=bool(weight_OI.any()) and not made.packed[name].dequantise().any(),
            )
        return made


def round_embeddings(model: Any) -> dict[str, Packed]:
    """The token embedding and an output head of its own, in place, to the nearest of 8 bits in groups of 32, by their names.

    Raises:
        UserError: their width does not divide.
    """
    made: dict[str, Packed] = {}
    ends, weights = (model.get_input_embeddings(), model.get_output_embeddings()), []
    for name, layer in matrices_in(model).items():
        if layer not in ends or any(layer.weight is weight for weight in weights):  # a tied head is rounded as the embedding
            continue
        try:
            made[name] = round_to_nearest(layer.weight, EMBEDDING_GROUP, bits=8).cpu()
        except (UserError, NotDivisible) as problem:
            raise UserError(f"{name}: {problem}") from problem
        layer.weight.copy_(made[name].dequantise())
        weights.append(layer.weight)
    return made


def check_layers(model: Any) -> None:
    """Refuse a model most of whose weights are in no linear layer; a skeleton will do.

    Raises:
        UserError: it is a mixture of experts.
    """
    refuse_experts(model, "quantising would leave them at full precision", "leave this model unquantised")


def width_problems(config: Any, group: int) -> list[str]:
    """Why no linear layer of a model could be quantised, as far as its config tells; empty where some could."""
    model = skeleton(config)
    try:
        check_layers(model)
    except UserError as error:
        return [str(error)]
    layers = [layer for block in blocks_of(model) for layer in linears_in(block).values()]
    widths = sorted({weight_of(layer).shape[1] for layer in layers})
    if any(width % group == 0 for width in widths):
        return []
    smaller = next((size for size in (64, 32) if size < group and any(width % size == 0 for width in widths)), None)
    remedy = f"set group = {smaller}" if smaller else "leave this model unquantised"
    return [
        f"no layer's width ({', '.join(map(str, widths))}) divides into groups of {group}, so none can be quantised; {remedy}"
    ]
