"""A model's blocks run by themselves, on all batches side by side."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby, zip_longest
from typing import Any

from greenlet import greenlet
from torch import Tensor, nn

from potstill.core.errors import UserError
from potstill.edges.models import linears_in, states_of

Batch = dict[str, Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Call = tuple[Tensor, tuple[Any, ...], dict[str, Any]]


class Forwards:
    """One block's forwards, one for each batch, which stop before layers until these have been rounded.

    So every layer runs once on every batch, with the weights that it will have, and what it reads is heard on the way. Each
    forward is a greenlet: one of them runs at a time, in this thread, and keeps its place while others run.
    """

    def __init__(self, block: nn.Module, inputs: Sequence[Call], beside: Sequence[Call] | None = None) -> None:
        """
        Args:
            block: as it is at full precision.
            inputs: what it is called with behind rounded blocks.
            beside: what it is called with in the model of full precision, where that is to run beside.
        """
        self._block, self._inputs = block, inputs
        self._whole = copy.deepcopy(block) if beside is not None else block
        self._runs = [_Run(block, *call) for call in inputs]
        self._exact = [_Run(self._whole, *call) for call in beside or ()]

    def sharing_inputs(self) -> list[list[nn.Module]]:
        """The block's linear layers in the order they run, those that read one and the same tensor together.

        A layer that runs more than once reads more than one thing, and is left out.
        """
        heard: list[tuple[nn.Module, Tensor]] = []  # tensors are held, so that no later one can take their identity
        with _hearing(list(linears_in(self._block).values()), lambda layer, x: heard.append((layer, x))):
            x_BTD, args, kw = self._inputs[0]
            self._block(x_BTD, *args, **kw)
        times = Counter(layer for layer, _ in heard)
        sets = [[layer for layer, _ in same if times[layer] == 1] for _, same in groupby(heard, key=lambda pair: id(pair[1]))]
        return [shared for shared in sets if shared]

    def until(self, layer: nn.Module) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What the layer is about to read, batch by batch: behind rounded layers, and at full precision where that runs."""
        name = next(name for name, module in self._block.named_modules() if module is layer)
        beside = self._whole.get_submodule(name)
        for run, exact in zip_longest(self._runs, self._exact):
            yield run.until(layer), exact.until(beside) if exact is not None else None

    def ended(self) -> tuple[list[Tensor], list[Tensor]]:
        """The block's hidden states by batch, and those at full precision."""
        return [states_of(run.switch()) for run in self._runs], [states_of(run.switch()) for run in self._exact]


class _Run(greenlet):
    """One forward."""

    def __init__(self, block: nn.Module, x_BTD: Tensor, args: tuple[Any, ...], kw: dict[str, Any]) -> None:
        super().__init__(partial(block, x_BTD, *args, **kw))

    def until(self, layer: nn.Module) -> Tensor:
        """Go on until the layer is about to run; what it reads."""
        waiting = self.parent
        assert waiting is not None
        with _hearing([layer], lambda _, x: waiting.switch(x)):
            x = self.switch()
        if self.dead:
            raise UserError("it runs for some calibration rows and not for others; leave this model unquantised")
        return x


@contextmanager
def _hearing(layers: list[nn.Module], hear: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """While inside, `hear(layer, input)` is called before each of the layers runs."""

    def before(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        hear(layer, [*inputs, *named.values()][0])

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Inputs:
    """What the blocks are called with, by batch.

    Attributes:
        hidden: hidden states [B, T, D] before the block that is next.
        calls: by block and batch all other arguments. Some are written to: layers hand on keys and values that they share.
    """

    hidden: list[Tensor]
    calls: list[tuple[Arguments, ...]]

    def of(self, block: int) -> list[Call]:
        """What one block is called with."""
        return [(x_BTD, *call) for x_BTD, call in zip(self.hidden, self.calls[block], strict=True)]


def block_inputs(model: Any, blocks: list[nn.Module], batches: Sequence[Batch]) -> Inputs:
    """What the first block reads, and what every block is called with beside its hidden states.

    Masks and positions do not depend on the hidden states, so every block is replaced by the identity
    while they are listened for, which costs the embedding and nothing more.

    Raises:
        UserError: there are no batches.
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
    return Inputs(hidden, list(zip(*calls, strict=True)))


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


def positions(x: Tensor, batch: Batch, rows: slice) -> tuple[Tensor, Tensor | None]:
    """The inputs [N, in] of positions that count in some rows of a batch, and how much each does; None: alike."""
    weight_BT = batch.get("weight", batch["attention_mask"]).to(x.device)
    x_BTI = x.reshape(*weight_BT.shape, -1)[rows]  # OPT lays the rows of a batch end to end
    weight_BT = weight_BT[rows]
    counts_BT = weight_BT > 0
    return x_BTI[counts_BT], weight_BT[counts_BT] if "weight" in batch else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model runs without dropout."""
    training = model.training
    model.eval()  # dropout would put noise into the Hessians
    try:
        yield
    finally:
        model.train(training)
