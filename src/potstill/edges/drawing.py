"""Which token comes next: temperature, cuts, and the number that draws."""

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.core.errors import UserError

BLOCK = 256  # tokens whose probabilities are added first: a row is then searched by its blocks, and inside one of them
LEAST = 1e-30  # temperature: of a smaller one float32 makes 0
REACHED = 1e-12  # of a probability: a sum that differs by rounding alone reaches `top_p`


@dataclass(frozen=True)
class Drawing:
    """How a token is drawn from logits z: p ∝ exp(z / temperature) over the tokens that the cuts leave, in this order.

    `top_k`: the k likeliest tokens. `top_p`: of these, made to sum to 1, the fewest likeliest that reach `top_p`.
    `min_p`: tokens at least `min_p` times as likely as the likeliest. Of tokens that are equally likely the first one in the
    vocabulary counts as the likelier one. At temperature 0 the likeliest token is taken.

    Attributes:
        vocab: leading token ids that can be drawn; None: all, those that a model pads its output layer with among them.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    vocab: int | None = None

    def __call__(self, logits_BV: Tensor, u_B: Tensor | None, scored: bool = True) -> tuple[Tensor, Tensor | None]:
        """Tokens [B], and their log-probabilities [B] in float32: tempered and cut, at temperature 0 the model's own.

        A token is the first one at which the cumulative probability exceeds its row's u; the sums are in float64.

        Args:
            logits_BV: float32.
            u_B: in [0, 1), float64; None at temperature 0.
            scored: at temperature 0, whether the log-probabilities are wanted; else they are None.

        Raises:
            UserError: the logits are not numbers.
        """
        if self.vocab is not None:
            logits_BV = logits_BV[:, : self.vocab]
        if u_B is None:
            token_B = logits_BV.argmax(-1)
            return token_B, _logp(logits_BV, token_B) if scored else None
        weight_BV = self.weights(logits_BV)
        block_BK = _block_sums(weight_BV)
        token_B = _at(u_B, block_BK, weight_BV)
        top_B, own_B = logits_BV.amax(-1).double(), _of(logits_BV, token_B).double()
        return token_B, ((own_B - top_B) / self._divisor - block_BK.sum(-1).log()).float()

    @property
    def _divisor(self) -> float:
        return max(self.temperature, LEAST)

    def weights(self, logits_BV: Tensor) -> Tensor:
        """[B, V] in proportion to the probabilities, the likeliest token's 1, those of tokens that are cut 0."""
        scaled_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
        weight_BV = (scaled_BV if self.temperature == 1 else scaled_BV.div_(self._divisor)).exp_()
        kept_BV = self.kept(logits_BV)
        return weight_BV if kept_BV is None else weight_BV.masked_fill_(~kept_BV, 0.0)

    def kept(self, logits_BV: Tensor) -> Tensor | None:
        """[B, V]: whether a token can be drawn; None where every one can."""
        kept_BV = None
        if self.top_k is not None and self.top_k < logits_BV.shape[-1]:
            kept_BV = _likeliest(logits_BV, self.top_k)
        if self.top_p < 1:
            kept_BV = self._nucleus(logits_BV if kept_BV is None else logits_BV.masked_fill(~kept_BV, -torch.inf))
        if self.min_p > 0:
            below_BV = (logits_BV.double() - logits_BV.amax(-1, keepdim=True).double()) / self._divisor
            likely_BV = below_BV.exp() >= self.min_p
            kept_BV = likely_BV if kept_BV is None else kept_BV & likely_BV
        return kept_BV

    def _nucleus(self, logits_BV: Tensor) -> Tensor:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        p_BV = (sorted_BV.double() / self._divisor).softmax(-1)
        before_BV = p_BV.cumsum(-1) - p_BV
        kept_BV = (before_BV < self.top_p - REACHED) & (sorted_BV > -torch.inf)
        return torch.zeros_like(kept_BV).scatter_(-1, order_BV, kept_BV)


def _likeliest(logits_BV: Tensor, k: int) -> Tensor:
    """Exactly k tokens of each row; of equals at the edge the first ones."""
    least_B1 = logits_BV.topk(k, dim=-1).values[:, -1:]
    more_BV, equal_BV = logits_BV > least_B1, logits_BV == least_B1
    return more_BV | (equal_BV & (equal_BV.cumsum(-1) <= k - more_BV.sum(-1, keepdim=True)))


def _logp(logits_BV: Tensor, token_B: Tensor) -> Tensor:
    total_B = _block_sums((logits_BV - logits_BV.amax(-1, keepdim=True)).exp_()).sum(-1)
    return (_of(logits_BV, token_B).double() - logits_BV.amax(-1).double() - total_B.log()).float()


def _of(values_BV: Tensor, token_B: Tensor) -> Tensor:
    return values_BV.gather(-1, token_B[:, None]).squeeze(-1)


def _block_sums(weight_BV: Tensor) -> Tensor:
    """[B, K] in float64; float64 from the first addition on would take four times as long."""
    whole = weight_BV.shape[-1] // BLOCK * BLOCK
    sums_BK = weight_BV[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1)
    if whole < weight_BV.shape[-1]:
        sums_BK = torch.cat([sums_BK, weight_BV[:, whole:].sum(-1, keepdim=True)], dim=-1)
    if not bool(sums_BK.isfinite().all()):
        raise UserError("the model's logits are not numbers (NaN or infinite), so that no token can be drawn from them")
    return sums_BK.double()


def _at(u_B: Tensor, block_BK: Tensor, weight_BV: Tensor) -> Tensor:
    """The first token at which the cumulative weight exceeds u times the whole."""
    upto_BK = block_BK.cumsum(-1)
    place_B1 = _below(u_B[:, None] * upto_BK[:, -1:], upto_BK[:, -1:])
    k_B1 = torch.searchsorted(upto_BK, place_B1, right=True)
    inside_B1 = place_B1 - (upto_BK - block_BK).gather(-1, k_B1)
    ids_BS = k_B1 * BLOCK + torch.arange(BLOCK, device=weight_BV.device)
    within_BS = ids_BS < weight_BV.shape[-1]
    some_BS = weight_BV.gather(-1, ids_BS.clamp(max=weight_BV.shape[-1] - 1)).double() * within_BS
    upto_BS = some_BS.cumsum(-1)
    s_B1 = torch.searchsorted(upto_BS, _below(inside_B1.clamp(min=0), upto_BS[:, -1:]), right=True)
    return (k_B1 * BLOCK + s_B1).squeeze(-1)


def _below(place: Tensor, total: Tensor) -> Tensor:
    """Rounding must not carry a place up to the end, behind the last token that has a weight."""
    return torch.minimum(place, torch.nextafter(total, torch.zeros_like(total)))
