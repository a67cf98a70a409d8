"""Many answers at once: rows that have ended leave, keys and values lie in blocks, and no head's keys are copied."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.edges.checked import cache_name, places
from potstill.edges.models import Model
from potstill.edges.packed import packs, prepare

BLOCK = 64  # tokens by which room for keys and values grows
LEAVE = 0.125  # share of a batch's rows that have ended, from which on they leave


@torch.inference_mode()
def decode_batch(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    temperature: float,
    uniform: Callable[[int], Tensor] | None = None,
    on_ended: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """New tokens of each prompt, the one that ends it included; equal to each prompt alone, to rounding.

    Args:
        prompts: token ids, padded here on the left.
        temperature: of sampling over the whole vocabulary; at 0 the likeliest token is taken, the first of equals.
        uniform: for sampling, numbers in [0, 1) of one row, by the row: [max_new_tokens] in float64.
        on_ended: gets, after every token, how many rows have ended.
    """
    if packs(model):
        prepare(model)
    device, width = model.device, max(map(len, prompts))
    ids_BT = torch.full((len(prompts), width), pad_id)
    mask_BT = torch.zeros((len(prompts), width), dtype=torch.long)
    for b, prompt in enumerate(prompts):
        ids_BT[b, width - len(prompt) :] = torch.as_tensor(prompt)
        mask_BT[b, width - len(prompt) :] = 1
    stops = torch.tensor(list(stop_ids), device=device)
    u_BN = torch.stack([uniform(b) for b in range(len(prompts))]).to(device) if uniform is not None else None
    forward = _Forward(model, ids_BT.to(device), mask_BT.to(device))
    new = torch.full((len(prompts), max_new_tokens), pad_id, device=device)
    lengths = [max_new_tokens] * len(prompts)
    rows_B = torch.arange(len(prompts), device=device)  # of those that are still in the batch
    ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for n in range(max_new_tokens):
        next_B = _next(forward.logits_BV, temperature, u_BN[rows_B, n] if u_BN is not None else None)
        new[rows_B, n] = next_B
        ends_B = torch.isin(next_B, stops)
        for b in rows_B[ends_B & ~ended_B].tolist():
            lengths[b] = n + 1
        ended_B = ended_B | ends_B
        if on_ended is not None:
            on_ended(len(prompts) - len(rows_B) + int(ended_B.sum()))
        if bool(ended_B.all()) or n + 1 == max_new_tokens:
            break
        if ended_B.sum() >= max(1, LEAVE * len(rows_B)) and forward.keep(~ended_B):
            next_B, rows_B, ended_B = next_B[~ended_B], rows_B[~ended_B], ended_B[~ended_B]
        forward.step(next_B)
    return [row[:length].tolist() for row, length in zip(new.cpu(), lengths, strict=True)]


def _next(logits_BV: Tensor, temperature: float, u_B: Tensor | None) -> Tensor:
    """The next token of each row: the likeliest, or the one at which the cumulative probability first exceeds u."""
    if u_B is None:
        return logits_BV.argmax(-1)
    cumulative_BV = (logits_BV.double() / temperature).softmax(-1).cumsum(-1)
    place_B = u_B * cumulative_BV[:, -1]  # the sum is 1 but for rounding
    return torch.searchsorted(cumulative_BV, place_B[:, None], right=True).squeeze(-1).clamp(max=logits_BV.shape[-1] - 1)


class _Forward:
    """A batch that is read once and then continued token by token.

    Attributes:
        logits_BV: of the next token.
    """

    def __init__(self, model: Model, ids_BT: Tensor, mask_BT: Tensor) -> None:
        self.model, self.mask_BT = model, mask_BT
        self.few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self.cache: Any = None
        self._run(ids_BT, (mask_BT.cumsum(-1) - 1).clamp(min=0))

    def step(self, next_B: Tensor) -> None:
        """Read one more token of each row."""
        self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(next_B), 1)], dim=-1)
        self._run(next_B[:, None], self.mask_BT.sum(-1, keepdim=True) - 1)

    def keep(self, kept_B: Tensor) -> bool:
        """Let the other rows go; False where the model's cache cannot.

        `reorder_cache` is what every kind of layer has; `batch_select_indices` leaves recurrent states as they were.
        """
        if not all(hasattr(layer, "reorder_cache") for layer in getattr(self.cache, "layers", [None])):
            return False
        self.cache.reorder_cache(kept_B.nonzero().squeeze(-1))
        self.mask_BT = self.mask_BT[kept_B]
        return True

    def _run(self, ids_BT: Tensor, places_BT: Tensor) -> None:
        more = places(self.model, places_BT)
        if self.cache is not None:
            more[cache_name(self.model)] = self.cache
        out = self.model(input_ids=ids_BT, attention_mask=self.mask_BT, use_cache=True, **self.few, **more)
        self.logits_BV = out.logits[:, -1].float()
        if self.cache is None:
            self.cache = in_blocks(out.past_key_values)


def in_blocks(cache: Any) -> Any:
    """The same cache, its plain layers with room for more tokens: appending one does not copy all before it."""
    from transformers.cache_utils import DynamicLayer

    class Blocks(DynamicLayer):
        """Keys and values [B, G, T, K] as views of larger tensors."""

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.keys = self._longer("keys", key_states)
            self.values = self._longer("values", value_states)
            return self.keys, self.values

        def _longer(self, name: str, new_BGTK: Tensor) -> Tensor:
            had_BGTK, room = getattr(self, name), getattr(self, f"room_{name}", None)
            had = had_BGTK.shape[-2]
            total = had + new_BGTK.shape[-2]
            if room is None or room.shape[0] != len(had_BGTK) or room.shape[-2] < total:
                room = had_BGTK.new_empty((*had_BGTK.shape[:2], total + BLOCK, had_BGTK.shape[-1]))
                room[..., :had, :] = had_BGTK
                setattr(self, f"room_{name}", room)
            room[..., had:total, :] = new_BGTK
            return room[..., :total, :]

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self.room_keys = self.room_values = None

    layers: list[Any] = getattr(cache, "layers", [])
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.keys.numel():
            layers[i] = Blocks()
            vars(layers[i]).update(vars(layer))
    return cache
