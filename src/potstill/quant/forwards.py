"""A model's blocks run by themselves, on all batches side by side."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import Any

from greenlet import greenlet
from torch import Tensor, nn

from potstill.core.errors import UserError
from potstill.edges.models import linears_in, states_of

Batch = dict[str, Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Forwards:
    """One block's forwards, one for each batch, which stop before layers until these have been rounded.

    So every layer runs once on every batch, with the weights that it will have, and what it reads is heard on the way. Each
    forward is a greenlet: one of them runs at a time, in this thread, and keeps its place while others run.
    """

    def __init__(
        self, block: nn.Module, hidden: Sequence[Tensor], arguments: Sequence[Arguments], exact: Sequence[Tensor] | None = None
    ) -> None:
        """
        Args:
            block: as it is at full precision.
            hidden: its hidden states [B, T, D] by batch, behind rounded blocks.
            arguments: the others that it is called with, by batch.
            exact: its hidden states in the model of full precision, where that is to run beside it.
        """
        self._block, self._first = block, (hidden[0], arguments[0])
        self._whole = copy.deepcopy(block) if exact is not None else block
        self._runs = [_Run(block, x_BTD, *call) for x_BTD, call in zip(hidden, arguments, strict=True)]
        self._exact = [_Run(self._whole, x_BTD, *call) for x_BTD, call in zip(exact or [], arguments, strict=exact is not None)]

    def sharing_inputs(self) -> list[list[nn.Module]]:
        """The block's linear layers in the order they run, those that read one and the same tensor together."""
        sets: list[list[nn.Module]] = []
        latest: list[Tensor] = []  # held, so that no later tensor can take its identity

        def hear(layer: nn.Module, x: Tensor) -> None:
            if latest and latest[-1] is x:
                sets[-1].append(layer)
            else:
                sets.append([layer])
                latest.append(x)

        x_BTD, (args, kw) = self._first
        with _hearing(list(linears_in(self._block).values()), hear):
            self._block(x_BTD, *args, **kw)
        return sets

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
        assert not self.dead, "a layer that runs on the first batch and not on this one"
        return x


@contextmanager
def _hearing(layers: list[nn.Module], hear: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """While inside, `hear(layer, input)` is called before each of the layers runs."""

    def before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        hear(layer, inputs[0])

    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def block_inputs(
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
