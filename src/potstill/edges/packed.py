"""Rows end to end through a transformers model, each attending to itself alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.core.errors import UserError
from potstill.edges.models import Model

_NAME = "potstill_packed"
_lengths: ContextVar[Sequence[int]] = ContextVar("lengths")


def final_hidden(model: Model, ids_T: Tensor, position_T: Tensor, lengths: Sequence[int]) -> Tensor:
    """Final hidden states [T, D] of documents laid end to end; equal to one document at a time, without any padding.

    Args:
        ids_T: token ids of all documents.
        position_T: position of each token in its document, from 0.
        lengths: tokens of each document; equal lengths side by side are attended in one call.

    Raises:
        UserError: the model attends through a sliding window shorter than a document.
    """
    window = getattr(model.config, "sliding_window", None)
    if window and max(lengths) > window:
        raise UserError(
            f"the model attends through a window of {window} tokens, and a row has {max(lengths)}; lower prompts.max_tokens"
        )
    with _attending_within(model, lengths):
        states = model.base_model(input_ids=ids_T[None], position_ids=position_T[None], use_cache=False)
    return states.last_hidden_state[0]


@contextmanager
def _attending_within(model: Model, lengths: Sequence[int]) -> Iterator[None]:
    _register()
    config = model.config
    before, token = config._attn_implementation, _lengths.set(lengths)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _lengths.reset(token)


@cache
def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)  # no mask function of this name: none is built


def _attend(
    module: Any,
    query_1HTK: Tensor,
    key_1GTK: Tensor,
    value_1GTK: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document. Kernels for block-diagonal masks pay for the whole square; these do not."""
    shared = query_1HTK.shape[1] // key_1GTK.shape[1]
    if shared > 1:
        key_1GTK, value_1GTK = (t.repeat_interleave(shared, dim=1) for t in (key_1GTK, value_1GTK))
    _, H, _, K = query_1HTK.shape
    parts, begin = [], 0
    for length, run in groupby(_lengths.get()):
        count = sum(1 for _ in run)
        end = begin + count * length
        query, key, value = (
            t[0, :, begin:end].reshape(H, count, length, K).transpose(0, 1) for t in (query_1HTK, key_1GTK, value_1GTK)
        )
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
        parts.append(out.transpose(1, 2).reshape(count * length, H, K))
        begin = end
    return torch.cat(parts)[None], None
