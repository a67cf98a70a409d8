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


class Tie:
    """Where the output head's matrix is the embedding's: lets the embedding's gradient, a few rows, join the head's.

    Autograd would fill another [V, D] with zeros for these rows and add the two.

    Attributes:
        gradient: the head's [V, D], from its backward pass to the embedding's, which follows in the same sweep.
    """

    def __init__(self) -> None:
        self.gradient: Tensor | None = None


def tie_of(model: Model) -> Tie | None:
    """A tie for one forward and backward pass; None where the two matrices differ or are not trained."""
    weight, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    return Tie() if head.weight is weight and weight.requires_grad and torch.is_grad_enabled() else None


class _TiedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, ids_T: Tensor, padding: int | None, tie: Tie) -> Tensor:
        ctx.shape, ctx.padding, ctx.tie = weight_VD.shape, padding, tie
        ctx.save_for_backward(ids_T)
        return F.embedding(ids_T, weight_VD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad_TD,), (ids_T,) = grad_outputs, ctx.saved_tensors
        if ctx.padding is not None:  # as torch's own embedding has it
            grad_TD = grad_TD.masked_fill((ids_T == ctx.padding)[:, None], 0)
        gradient_VD, ctx.tie.gradient = ctx.tie.gradient, None
        if gradient_VD is None:
            return grad_TD.new_zeros(ctx.shape).index_add_(0, ids_T, grad_TD), None, None, None
        gradient_VD.index_add_(0, ids_T, grad_TD.to(gradient_VD.dtype))
        return None, None, None, None


def final_hidden(model: Model, ids_T: Tensor, position_T: Tensor, lengths: Sequence[int], tie: Tie | None = None) -> Tensor:
    """Final hidden states [T, D] of documents laid end to end; equal to one document at a time, without any padding.

    Args:
        ids_T: token ids of all documents.
        position_T: position of each token in its document, from 0.
        lengths: tokens of each document; equal lengths side by side are attended in one call.
        tie: of this pass, see `tie_of`.

    Raises:
        UserError: the model attends through a sliding window shorter than a document.
    """
    window = getattr(model.config, "sliding_window", None)
    if window and max(lengths) > window:
        raise UserError(
            f"the model attends through a window of {window} tokens, and a row has {max(lengths)}; lower prompts.max_tokens"
        )
    if tie is None:
        tokens = {"input_ids": ids_T[None]}
    else:
        embedding = model.get_input_embeddings()
        tokens = {"inputs_embeds": _TiedEmbedding.apply(embedding.weight, ids_T, embedding.padding_idx, tie)[None]}
    with _attending_within(model, lengths):
        states = model.base_model(**tokens, position_ids=position_T[None], use_cache=False)
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
    return attend_within(query_1HTK, key_1GTK, value_1GTK, _lengths.get(), dropout, scaling)[None], None


def attend_within(
    query_1HTK: Tensor,
    key_1GTK: Tensor,
    value_1GTK: Tensor,
    lengths: Sequence[int],
    dropout: float = 0.0,
    scaling: float | None = None,
) -> Tensor:
    """[T, H, K]; one call for each run of equal lengths. `benchmarks/attention.py` measures it against other ways."""
    shared = query_1HTK.shape[1] // key_1GTK.shape[1]
    if shared > 1:
        key_1GTK, value_1GTK = (t.repeat_interleave(shared, dim=1) for t in (key_1GTK, value_1GTK))
    _, H, _, K = query_1HTK.shape
    parts, begin = [], 0
    for length, run in groupby(lengths):
        count = sum(1 for _ in run)
        end = begin + count * length
        query, key, value = (
            t[0, :, begin:end].reshape(H, count, length, K).transpose(0, 1) for t in (query_1HTK, key_1GTK, value_1GTK)
        )
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
        parts.append(out.transpose(1, 2).reshape(count * length, H, K))
        begin = end
    return torch.cat(parts)
