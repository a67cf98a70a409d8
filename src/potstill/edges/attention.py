"""Causal attention inside the documents of a pack."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST = 512  # tokens of a document up to which plain products are the faster way in bfloat16 on a CPU


@dataclass(frozen=True)
class Shared:
    """How T tokens, of which documents share some, become the F tokens of the whole documents end to end, and back.

    A document's token attends to what the document begins with, wherever that lies; all else that a network does with a token
    it does once, however many documents the token belongs to. Gradients of the documents add up at a token that they share.

    Attributes:
        spread_F: of each token of the whole documents, which of the T it is.
        kept_T: of each of the T, one place among the F where it stands.
    """

    spread_F: Tensor
    kept_T: Tensor

    @classmethod
    def of(cls, first_F: Tensor) -> "Shared":
        """From the first place among the F that holds the same token; tokens keep their order."""
        kept_T, spread_F = first_F.unique(return_inverse=True)
        return cls(spread_F, kept_T)

    def spread(self, tokens: Tensor, dim: int = 0) -> Tensor:
        """[…, F, …] of […, T, …]."""
        return tokens.index_select(dim, self.spread_F)

    def keep(self, tokens_F: Tensor) -> Tensor:
        """[T, …] of [F, …]."""
        return tokens_F.index_select(0, self.kept_T)

    def to(self, device: torch.device) -> "Shared":
        return Shared(self.spread_F.to(device), self.kept_T.to(device))


def attend_within(
    query_1HTK: Tensor,
    key_1GTK: Tensor,
    value_1GTK: Tensor,
    lengths: Sequence[int],
    dropout: float = 0.0,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """[T, H, K]; one call for each run of equal lengths. `benchmarks/attention.py` measures it against other ways.

    Args:
        window: tokens that a token sees, itself included; default: all before it.
        softcap: c of scores c·tanh(score / c), where they have one.
    """
    if softcap is None and dropout == 0 and max(lengths) <= LONGEST and _in_bf16_on_cpu(query_1HTK):
        scale = scaling if scaling is not None else query_1HTK.shape[-1] ** -0.5
        three = (t.to(torch.bfloat16) for t in (query_1HTK, key_1GTK, value_1GTK))
        return _Products.apply(*three, tuple(lengths), scale, window)
    shared = query_1HTK.shape[1] // key_1GTK.shape[1]
    if shared > 1:
        key_1GTK, value_1GTK = (t.repeat_interleave(shared, dim=1) for t in (key_1GTK, value_1GTK))
    _, H, _, K = query_1HTK.shape
    runs = runs_of(lengths)
    # one split: on the way back each slice of its own would fill a tensor of the whole with zeros
    split = [t.squeeze(0).split([length * count for length, count in runs], dim=1) for t in (query_1HTK, key_1GTK, value_1GTK)]
    parts = []
    for (length, count), *of_run in zip(runs, *split, strict=True):
        query, key, value = (t.reshape(H, count, length, K).transpose(0, 1) for t in of_run)
        seen_TT = _seen(length, window, query.device) if window is not None and length > window else None
        if softcap is None:
            out = F.scaled_dot_product_attention(
                query, key, value, seen_TT, dropout_p=dropout, is_causal=seen_TT is None, scale=scaling
            )
        else:
            out = _capped_attention(query, key, value, _seen(length, window, query.device), dropout, scaling, softcap)
        parts.append(out.transpose(1, 2).reshape(count * length, H, K))
    return torch.cat(parts)


def runs_of(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(length, how many) of equal lengths that stand side by side."""
    return [(length, sum(1 for _ in run)) for length, run in groupby(lengths)]


def _in_bf16_on_cpu(query: Tensor) -> bool:
    """Whether torch's own attention would multiply in bfloat16 on a CPU, where its kernel is slower than products are."""
    if query.device.type != "cpu":
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    return dtype == torch.bfloat16


class _Products(torch.autograd.Function):
    """softmax(q·kᵀ·scale)·v by matrix products; queries that share keys lie side by side, and weights are made again on the
    way back (as FlashAttention does, Dao et al., arXiv:2205.14135, section 3.1)."""

    @staticmethod
    def forward(
        ctx: Any,
        query_1HTK: Tensor,
        key_1GTK: Tensor,
        value_1GTK: Tensor,
        lengths: tuple[int, ...],
        scale: float,
        window: int | None,
    ) -> Tensor:
        ctx.lengths, ctx.scale, ctx.window = lengths, scale, window
        ctx.save_for_backward(query_1HTK, key_1GTK, value_1GTK)
        _, H, T, K = query_1HTK.shape
        out_THK = query_1HTK.new_empty(T, H, K)
        for tokens, shape, mask in _runs(lengths, window, query_1HTK):
            query, key, value = (
                _rows_of(t[0, :, tokens], *shape, key_1GTK.shape[1]) for t in (query_1HTK, key_1GTK, value_1GTK)
            )
            out = torch.bmm(_weights(query, key, scale, mask), value)
            _heads(out_THK[tokens].transpose(0, 1), out, *shape, key_1GTK.shape[1])
        return out_THK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad_THK,), three = grad_outputs, ctx.saved_tensors
        grads, G = [torch.empty_like(t) for t in three], three[1].shape[1]
        for tokens, shape, mask in _runs(ctx.lengths, ctx.window, three[0]):
            query, key, value = (_rows_of(t[0, :, tokens], *shape, G) for t in three)
            grad = _rows_of(grad_THK[tokens].transpose(0, 1), *shape, G)
            weight = _weights(query, key, ctx.scale, mask)
            of_weight = torch.bmm(grad, value.transpose(1, 2))
            of_score = torch.ops.aten._softmax_backward_data(of_weight, weight, -1, weight.dtype)
            of_each = (
                torch.bmm(of_score, key).mul_(ctx.scale),
                torch.bmm(of_score.transpose(1, 2), query).mul_(ctx.scale),
                torch.bmm(weight.transpose(1, 2), grad),
            )
            for whole, part in zip(grads, of_each, strict=True):
                _heads(whole[0, :, tokens], part, *shape, G)
        return (*grads, None, None, None)


def _runs(lengths: Sequence[int], window: int | None, like: Tensor) -> Iterator[tuple[slice, tuple[int, int], Tensor]]:
    """For each run of equal lengths its tokens, (count, length), and what is added to scores: -∞ where nothing is seen."""
    begin = 0
    for length, count in runs_of(lengths):
        hidden_TT = ~_seen(length, window, like.device)
        yield (
            slice(begin, begin + count * length),
            (count, length),
            torch.zeros(length, length, device=like.device).masked_fill_(hidden_TT, -torch.inf),
        )
        begin += count * length


def _rows_of(part_HTK: Tensor, count: int, length: int, groups: int) -> Tensor:
    """[count · groups, heads of a group · length, K] of [H, count · length, K]."""
    H, _, K = part_HTK.shape
    return part_HTK.reshape(groups, H // groups, count, length, K).permute(2, 0, 1, 3, 4).reshape(count * groups, -1, K)


def _heads(out_HTK: Tensor, rows: Tensor, count: int, length: int, groups: int) -> None:
    """Write what `_rows_of` would take from there."""
    H, _, K = out_HTK.shape
    out_HTK.unflatten(1, (count, length)).copy_(
        rows.view(count, groups, H // groups, length, K).permute(1, 2, 0, 3, 4).reshape(H, count, length, K)
    )


def _weights(query: Tensor, key: Tensor, scale: float, mask_TT: Tensor) -> Tensor:
    """Of each query token, how much it looks at each token of its document.

    Scores and their softmax are in float32, as in torch's kernel: a score of 100 is known to a half in bfloat16.
    """
    mask = mask_TT.repeat(query.shape[1] // len(mask_TT), 1).expand(len(query), -1, -1)
    with torch.autocast("cpu", enabled=False):
        scores = torch.baddbmm(mask, query.float(), key.float().transpose(1, 2), alpha=scale)
        return scores.softmax(-1).to(query.dtype)


def _seen(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [T, T]: which tokens, by column, each token sees."""
    ones_TT = torch.ones(length, length, dtype=torch.bool, device=device)
    seen_TT = ones_TT.tril()
    return seen_TT if window is None else seen_TT & ones_TT.triu(1 - window)


def _capped_attention(
    query_BHTK: Tensor,
    key_BHTK: Tensor,
    value_BHTK: Tensor,
    seen_TT: Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """softmax(c·tanh(q·k·scale / c))·v, which no kernel of torch does (Gemma 2, arXiv:2408.00118).

    Scores are in float32 at least, as in `_weights`.
    """
    scale = scaling if scaling is not None else query_BHTK.shape[-1] ** -0.5
    exact = torch.promote_types(query_BHTK.dtype, torch.float32)
    with torch.autocast(query_BHTK.device.type, enabled=False):
        product_BHTT = query_BHTK.to(exact) @ key_BHTK.to(exact).transpose(-1, -2)
    score_BHTT = softcap * (product_BHTT * (scale / softcap)).tanh()
    weight_BHTT = score_BHTT.masked_fill(~seen_TT, -torch.inf).softmax(-1)
    return F.dropout(weight_BHTT.to(value_BHTK.dtype), dropout) @ value_BHTK
