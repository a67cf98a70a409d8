"""A student of some of a model's layers."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from potstill.core.errors import UserError
from potstill.edges.models import Model, blocks_name, blocks_of, check_cut, states_of
from potstill.inits import Calibration, Choice, Init, Read


class Layers(Init, kind="layers"):
    """Keep some decoder layers, with embeddings, final norm and head; DistilBERT's start, Sanh et al., arXiv:1910.01108.

    `keep` names them. With `count`, calibration rows choose. By loss: one layer after another goes, each time the one
    without which the remaining model's NLL of the rows' responses is least. By influence: those layers go at once whose
    output points most in the direction of their input, 1 − cos(x, layer(x)) averaged over tokens (ShortGPT,
    Men et al., arXiv:2403.03853, equation 1).
    """

    keep: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="layers to keep, counted from 0, in the order they have"
    )
    count: int | None = Field(default=None, ge=1, description="keep so many layers, those that calibration rows show to matter")
    by: Literal["loss", "influence"] | None = Field(
        default=None,
        description="with count. loss (default): best, reads the rows about (layers² - count²) / 4 times; influence: once",
    )
    rows: int | None = Field(default=None, ge=1, description="with count: training rows to calibrate on; default: 16")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_count(cls, given: Any) -> Any:
        chooses = isinstance(given, dict) and given.get("count") is not None
        return {"by": "loss", "rows": 16} | given if chooses else given

    @field_validator("keep")
    @classmethod
    def _rises(cls, keep: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if keep is not None and any(a >= b for a, b in zip((-1, *keep), keep, strict=False)):
            raise ValueError("must be layers counted from 0, each after the one before it, such as [0, 2, 4]")
        return keep

    @model_validator(mode="after")
    def _one_way(self) -> "Layers":
        if (self.keep is None) == (self.count is None):
            raise ValueError("needs keep = [layers] or count = how many, and not both")
        given = "by" if self.by is not None else "rows" if self.rows is not None else ""
        if self.keep is not None and given:
            raise ValueError(f"{given} is for count, which chooses layers; leave it out, or give count in place of keep")
        return self

    def shape(self, config: Any) -> Any:
        has = config.num_hidden_layers
        if self.count is not None:
            if self.count >= has:
                raise UserError(f"init.count = {self.count}: the model has {has} layers; choose fewer than that")
            return check_cut(config, [layer * has // self.count for layer in range(self.count)])
        return check_cut(config, self._named(has))

    def _named(self, has: int) -> tuple[int, ...]:
        assert self.keep
        keep = self.keep
        if keep[-1] >= has:
            raise UserError(f"init.keep = {list(keep)}: the model has {has} layers, 0 to {has - 1}; name some of these")
        return keep

    def calibration(self, config: Any) -> Calibration:
        if self.count is None or self.rows is None:
            return Calibration()
        if self.by == "influence":
            return Calibration(self.rows, 1, 1.0)
        has = config.num_hidden_layers
        sizes = range(self.count + 1, has + 1)  # of n layers, the removal of the k-th is tried by those after it
        recorded, tried = sum(sizes) / has, sum(n * (n - 1) / 2 for n in sizes) / has
        return Calibration(self.rows, len(sizes) + sum(sizes), recorded + tried)

    def layers_kept(self, config: Any, choice: Choice) -> tuple[int, ...]:
        return choice.keep if choice.keep is not None else self._named(config.num_hidden_layers)

    def without_rows(self) -> str:
        return "name the layers: keep = [0, 2, …]"

    def choose(self, model: Model, nll: Read) -> Choice:
        assert self.count is not None
        assert self.rows is not None
        ask = partial(nll, model, self.rows)
        if self.by == "influence":
            influence = block_influence(model, ask)
            order = sorted(range(len(influence)), key=lambda layer: -influence[layer])
            keep = sorted(order[: self.count])
            return Choice(tuple(keep), {"by": "influence", "rows": self.rows, "keep": keep, "influence": influence})
        keep, before, removed = removed_by_loss(model, self.count, ask)
        figures = {"by": "loss", "rows": self.rows, "keep": keep, "nll_before": before, "removed": removed}
        return Choice(tuple(keep), figures)

    def weights(self, model: Model, choice: Choice) -> tuple[Any, dict[str, Tensor]]:
        keep = self.layers_kept(model.config, choice)
        place = {layer: i for i, layer in enumerate(keep)}
        within = re.compile(rf"({re.escape(blocks_name(model))})\.(\d+)\.(.+)")
        found = {}
        for name, parameter in (*model.named_parameters(), *model.named_buffers()):
            layer = within.fullmatch(name)
            if layer is None:
                found[name] = parameter.detach().clone()
            elif int(layer[2]) in place:
                found[f"{layer[1]}.{place[int(layer[2])]}.{layer[3]}"] = parameter.detach().clone()
        return check_cut(model.config, keep), found


def block_influence(model: Model, ask: Callable[[], float]) -> list[float]:
    """1 − cos(x, layer(x)) of each layer, averaged over the tokens that `ask` lets the model read.

    Men et al., arXiv:2403.03853, equation 1.
    """
    blocks = blocks_of(model)
    sums, tokens = [0.0] * len(blocks), [0] * len(blocks)

    def hook(layer: int) -> Callable[..., None]:
        def seen(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            cosine = F.cosine_similarity(_entering(args, kwargs).float(), states_of(output).float(), dim=-1)
            sums[layer] += float((1 - cosine.double()).sum())
            tokens[layer] += cosine.numel()

        return seen

    handles = [block.register_forward_hook(hook(layer), with_kwargs=True) for layer, block in enumerate(blocks)]
    try:
        ask()
    finally:
        for handle in handles:
            handle.remove()
    return [total / count for total, count in zip(sums, tokens, strict=True)]


def removed_by_loss(
    model: Model, count: int, ask: Callable[[], float]
) -> tuple[list[int], float, list[dict[str, float | int]]]:
    """Layers that stay when one after another goes, each the one whose removal leaves the least loss; the first of equals.

    Returns:
        the layers that stay; the loss of the full model; each layer that went, with the loss without it.
    """
    walk = _Walk(model)
    stays = list(range(len(walk.blocks)))
    before, removed = walk.recorded(stays, ask), []
    while len(stays) > count:
        losses = {layer: walk.without(layer, stays, ask) for layer in stays}
        goes = min(stays, key=lambda layer: losses[layer])
        stays.remove(goes)
        removed.append({"layer": goes, "nll": losses[goes]})
        if len(stays) > count:
            walk.recorded(stays, ask)
    return stays, before, removed


class _Walk:
    """A model whose layers are skipped, and whose first layers need not run again: what they gave is kept."""

    def __init__(self, model: Model) -> None:
        self.blocks = blocks_of(model)
        self.entered: list[list[Tensor]] = []  # [layer][pass]: what entered a layer when it was recorded
        self.rest: list[Any] = [None] * len(self.blocks)  # [layer]: what its output held beside hidden states when it last ran

    def recorded(self, stays: Sequence[int], ask: Callable[[], float]) -> float:
        """The loss of the model of these layers."""
        self.entered = [[] for _ in self.blocks]

        def hook(layer: int) -> Callable[..., None]:
            def seen(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                self.entered[layer].append(_entering(args, kwargs))
                self.rest[layer] = output[1:] if isinstance(output, tuple) else None

            return seen

        handles = [block.register_forward_hook(hook(layer), with_kwargs=True) for layer, block in enumerate(self.blocks)]
        gone = {layer: self._skip(layer) for layer in range(len(self.blocks)) if layer not in stays}
        try:
            with _replaced(self.blocks, gone):
                return ask()
        finally:
            for handle in handles:
                handle.remove()

    def without(self, layer: int, stays: Sequence[int], ask: Callable[[], float]) -> float:
        """The loss without one more layer than in the recording: the first layer gives at once what entered it."""
        passes = iter(range(len(self.entered[layer])))

        def jump(*args: Any, **kwargs: Any) -> Any:
            return self._output(0, self.entered[layer][next(passes)])

        skipped = {i: self._skip(i) for i in range(len(self.blocks)) if i <= layer or i not in stays}
        with _replaced(self.blocks, {**skipped, 0: jump}):
            return ask()

    def _skip(self, layer: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._output(layer, _entering(args, kwargs))

    def _output(self, layer: int, states: Tensor) -> Any:
        rest = self.rest[layer]
        return states if rest is None else (states, *rest)


@contextmanager
def _replaced(blocks: Sequence[Any], forwards: dict[int, Callable[..., Any]]) -> Iterator[None]:
    """Layers that do something else for a while."""
    for layer, forward in forwards.items():
        blocks[layer].forward = forward
    try:
        yield
    finally:
        for layer in forwards:
            del blocks[layer].forward


def _entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
