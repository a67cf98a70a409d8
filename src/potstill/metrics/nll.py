"""Negative log-likelihood."""

from typing import ClassVar

from torch import Tensor

from potstill.metrics import TokenMetric


class NLL(TokenMetric, kind="nll"):
    """−log q(target) in nats per response token, end-of-turn included; its exponential is the perplexity.

    In a study whose models have different tokenizers: nats per byte of the reference, as UTF-8.
    """

    unit: ClassVar[str] = "nats/token"
    per_byte: ClassVar[str] = "nats/byte"
    higher_is_better: ClassVar[bool] = False
    title: ClassVar[str] = "NLL"

    def __call__(self, logq_NV: Tensor, target_N: Tensor, logp_NV: Tensor | None) -> Tensor:
        return -logq_NV.gather(-1, target_N[:, None]).squeeze(-1)
