"""Walking a language model's blocks and rounding every linear layer on the inputs it will really see."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from potstill.core.errors import UserError
from potstill.edges.codes import weight_of
from potstill.edges.experts import refuse_experts
from potstill.edges.models import blocks_of, linears_in, matrices_in, skeleton, states_of
from potstill.quant.finished import Finished, LayerError, Quantised
from potstill.quant.gptq import Hessian, NotDivisible, output_error, round_to_nearest, solve, wanted_weights
from potstill.quant.packed import Packed

Batch = dict[str, Tensor]
EMBEDDING_GROUP = 32  # a block of GGUF's Q8_0
OnLayer = Callable[[str, int, int, float | None], None]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Enough(Exception):
    """Every input that this pass was run for has been seen."""


@torch.no_grad()
def quantise_model(
    model: Any,
    batches: Sequence[Batch],
    *,
    method: Literal["gptq", "rtn"] = "gptq",
    bits: int = 4,
    group: int = 32,
    make_up: float = 0.0,
    embeddings: bool = False,
    finished: Finished | None = None,
    on_layer: OnLayer = lambda name, i, n, error: None,
    **settings: Any,
) -> Quantised:
    """Round every linear layer inside the decoder blocks, in place, first block first; the head stays, unless asked for.

    Layers that read the same tensor (q, k, v; then o; then gate, up; then down) are solved together, after all
    layers before them hold their rounded weights, so each one meets the inputs that it will meet in use. A block is
    run once for each such set, only as far as that set, and once more to feed the next block.

    Args:
        model: a transformers causal language model; becomes float32.
        batches: `input_ids` and `attention_mask`, both [B, T], padded on the right; padding enters no Hessian. `weight`, of
            the same shape, says how much each position counts; default: all alike.
        method: "rtn" rounds to nearest; its errors are measured on its own inputs.
        make_up: share of the errors of all layers before that a layer's codes make up for, see `wanted_weights`; at 0 the model
            of full precision need not run beside the quantised one.
        embeddings: round embeddings and head to the nearest of 8 bits, before anything else.
        finished: where each block's codes are kept once it is solved; those that are there already are taken as they are.
        on_layer: called with (name, index from 1, number of layers, its relative output error or None where kept).
        settings: of `solve`.

    Raises:
        UserError: a mixture of experts, no decoder blocks where they are looked for, no batches, inputs that are not finite, or
            a layer that `gptq` cannot solve; names it.
    """
    check_layers(model)
    model.float()  # codes times scales are exact in float32 and in nothing smaller
    blocks = blocks_of(model)
    names = {module: name for name, module in model.named_modules()}
    layers = {module: names[module] for block in blocks for module in linears_in(block).values()}
    rounding = partial(_round, method=method, bits=bits, group=group, make_up=make_up, settings=settings)
    drifts = method == "gptq" and make_up > 0
    with _evaluating(model):
        hidden, others = _block_inputs(model, blocks, batches)
        exact = list(hidden)  # what the model of full precision would have; follows the same path until something is rounded
        result = Quantised()
        if embeddings:
            result.packed |= round_embeddings(model)
            hidden, _ = _block_inputs(model, blocks, batches)
        for number, (block, arguments) in enumerate(zip(blocks, others, strict=True)):
            runs = _runs(block, hidden, arguments)
            whole = copy.deepcopy(block) if drifts else block
            before, here = len(result.errors) + len(result.kept), {layers[m]: m for m in linears_in(block).values()}
            known = finished.read(number) if finished is not None else None
            if known is not None:
                for name, packed in known.packed.items():
                    weight_of(here[name]).copy_(packed.dequantise())
                on_layer([*here][-1], before + len(here), len(layers), None)
            else:
                inputs = _Inputs(block, runs, batches, whole, _runs(whole, exact, arguments) if drifts else None)
                known = _solved(inputs, layers, rounding, partial(_counted, on_layer, before, len(layers)))
                if finished is not None:
                    finished.write(number, known)
            result.add(known)
            if drifts:
                exact = [states_of(run()) for run in _runs(whole, exact, arguments)]
            hidden = [states_of(run()) for run in runs]
    result.kept += [name for name in layers.values() if name not in result.packed and name not in result.kept]
    return result


def _counted(
    on_layer: Callable[[str, int, int, float | None], None],
    before: int,
    total: int,
    name: str,
    number: int,
    error: float | None,
) -> None:
    on_layer(name, before + number, total, error)


def _runs(block: nn.Module, hidden: Sequence[Tensor], arguments: Sequence[Arguments]) -> list[Callable[[], Any]]:
    return [partial(block, x_BTD, *args, **kw) for x_BTD, (args, kw) in zip(hidden, arguments, strict=True)]


@dataclass(frozen=True)
class _Inputs:
    """A block and what it reads.

    Attributes:
        runs: of the block on each batch, behind quantised layers.
        whole, exact: the block and its runs in the model of full precision; None where nobody asks for the difference.
    """

    block: nn.Module
    runs: Sequence[Callable[[], Any]]
    batches: Sequence[Batch]
    whole: nn.Module
    exact: Sequence[Callable[[], Any]] | None


def _solved(
    inputs: _Inputs,
    names: Mapping[nn.Module, str],
    rounding: Callable[[Tensor, Tensor, Tensor | None], tuple[Packed, LayerError]],
    on_layer: Callable[[str, int, float | None], None],
) -> Quantised:
    """One block's layers, rounded in place, those that share inputs together."""
    made, done = Quantised(), 0
    for shared in _sharing_inputs(inputs.block, inputs.runs[0]):
        hessian_II, drift_II = _sums(inputs, shared[0], names[shared[0]])
        for layer in shared:
            name, weight_OI, done = names[layer], weight_of(layer), done + 1
            try:
                packed, error = rounding(weight_OI, hessian_II, drift_II)
            except NotDivisible:
                made.kept.append(name)
                on_layer(name, done, None)
                continue
            except UserError as problem:
                raise UserError(f"{name}: {problem}") from problem
            weight_OI.copy_(packed.dequantise())
            made.packed[name], made.errors[name] = packed, error
            on_layer(name, done, error.rtn if error.gptq is None else error.gptq)
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


def _round(
    weight_OI: Tensor,
    hessian_II: Tensor,
    drift_II: Tensor | None,
    *,
    method: str,
    bits: int,
    group: int,
    make_up: float,
    settings: dict[str, Any],
) -> tuple[Packed, LayerError]:
    """Errors are those of the layer's own outputs at full precision on the same inputs, whatever codes are solved for."""
    weight_OI = weight_OI.to(hessian_II.device)
    nearest = round_to_nearest(weight_OI, group, bits=bits)
    wanted_OI = weight_OI
    if drift_II is not None:
        wanted_OI = wanted_weights(weight_OI, hessian_II, drift_II, settings.get("damping", 0.01), make_up)
    rtn, dead = output_error(weight_OI, nearest, hessian_II), int((hessian_II.diagonal() == 0).sum())
    if method == "rtn":
        return nearest.cpu(), LayerError(None, rtn, dead_columns=dead, vanished=_vanished(weight_OI, nearest))
    solved = solve(weight_OI, hessian_II, bits=bits, group=group, wanted_OI=wanted_OI.double(), **settings)
    error = LayerError(
        gptq=output_error(weight_OI, solved.packed, hessian_II),
        rtn=rtn,
        damping=solved.damping,
        dead_columns=solved.dead_columns,
        rounded_rows=solved.rounded_rows,
        vanished=_vanished(weight_OI, solved.packed),
    )
    return solved.packed.cpu(), error


def _vanished(weight_OI: Tensor, packed: Packed) -> bool:
    return bool(weight_OI.any()) and not packed.dequantise().any()


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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()  # dropout would put noise into the Hessians
    try:
        yield
    finally:
        model.train(training)


def _block_inputs(
    model: Any, blocks: list[nn.Module], batches: Sequence[Batch]
) -> tuple[list[Tensor], list[tuple[Arguments, ...]]]:
    """The first block's hidden states by batch, and by block and batch the other arguments it is called with.

    The arguments (masks, positions) do not depend on the hidden states, so every block is replaced by the identity
    while they are listened for, which costs the embedding and nothing more.
    """
    if not batches:
        raise UserError("quantising needs calibration rows and got none; raise the number of calibration rows")
    heard: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def listening(rest: tuple[Any, ...] | None) -> Callable[..., Any]:
        def listen(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            heard.append((hidden_states, args, kwargs))
            return hidden_states if rest is None else (hidden_states, *rest)

        return listen

    beside = _beside_states(model, blocks, batches[0]["input_ids"][:1, :1])
    for block, rest in zip(blocks, beside, strict=True):
        block.forward = listening(rest)
    try:
        hidden, calls = [], []
        for batch in batches:
            heard.clear()
            ids_BT, mask_BT = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
            model.base_model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
            assert len(heard) == len(blocks)
            hidden.append(heard[0][0])
            calls.append([(args, kwargs) for _, args, kwargs in heard])
    finally:
        for block in blocks:
            del block.forward
    return hidden, list(zip(*calls, strict=True))


def _beside_states(model: Any, blocks: list[nn.Module], ids_BT: Tensor) -> list[tuple[Any, ...] | None]:
    """What each block gives beside hidden states, asked of one token; None where it gives them alone."""
    rest: list[tuple[Any, ...] | None] = []

    def hear(_: nn.Module, __: Any, output: Any) -> None:
        rest.append(output[1:] if isinstance(output, tuple) else None)

    hooks = [block.register_forward_hook(hear) for block in blocks]
    try:
        model.base_model(input_ids=ids_BT.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return rest


@contextmanager
def _hearing(layers: list[nn.Module], hear: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """While inside, `hear(layer, input)` is called before each of the layers runs."""
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: hear(layer, inputs[0])) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _sharing_inputs(block: nn.Module, run: Callable[[], Any]) -> list[list[nn.Module]]:
    """The block's linear layers in the order they run, those that read one and the same tensor together."""
    sets: list[list[nn.Module]] = []
    latest: list[Tensor] = []  # held, so that no later tensor can take its identity

    def hear(layer: nn.Module, x: Tensor) -> None:
        if latest and latest[-1] is x:
            sets[-1].append(layer)
        else:
            sets.append([layer])
            latest.append(x)

    with _hearing(list(linears_in(block).values()), hear):
        run()
    return sets


def _sums(inputs: _Inputs, layer: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """H of this layer's input over every position that is not padding, and X̃ᵀ(X − X̃) where it is asked for.

    Raises:
        UserError: an input is not finite.
    """
    exact_layer = dict(inputs.whole.named_modules())[next(n for n, m in inputs.block.named_modules() if m is layer)]
    sums: tuple[Hessian, Hessian] | None = None
    for number, (run, batch) in enumerate(zip(inputs.runs, inputs.batches, strict=True)):
        x_NI, weights = _positions(_heard(layer, run), batch)
        hessian, drift = sums = sums or (Hessian(x_NI.shape[-1]), Hessian(x_NI.shape[-1]))
        hessian.add(x_NI, weights)
        if inputs.exact is not None:
            exact_NI, _ = _positions(_heard(exact_layer, inputs.exact[number]), batch)
            drift.add(x_NI, weights, exact_NI - x_NI)
    assert sums is not None
    if not torch.isfinite(sums[0].sum_II).all():
        raise UserError(f"{name}: its calibration inputs hold NaN or infinity; check that the model's loss is finite")
    return sums[0].sum_II, sums[1].sum_II if inputs.exact is not None else None


def _heard(layer: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What the layer reads, and no more of the block is run."""
    heard: list[Tensor] = []

    def hear(_: nn.Module, x: Tensor) -> None:
        heard.append(x)
        raise _Enough

    with _hearing([layer], hear), suppress(_Enough):
        run()
    return heard[0]


def _positions(x: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """The inputs [N, in] of positions that count, and how much each does; None: alike."""
    weight_BT = batch.get("weight", batch["attention_mask"]).to(x.device)
    x_BTI = x.reshape(*weight_BT.shape, -1)  # OPT lays the rows of a batch end to end
    counts_BT = weight_BT > 0
    return x_BTI[counts_BT], weight_BT[counts_BT] if "weight" in batch else None
