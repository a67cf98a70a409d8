"""Whether a file answers as the model that it was exported from: token ids, distributions position by position, limits."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Mean KL, nats per position. With q8_0 and q4_0 llama.cpp rounds activations to 8 bits, and with bf16 to bfloat16; f16, bf16
# and q8_0 round the weights too, f16 by less than shows. Measured on SmolLM2 135M: f32 below 1e-8, f16 3e-6, bf16 1e-4 of
# weights stored in it and 3e-3 of weights trained in float32, q8_0 4e-3 to 6e-3, q4_0 3e-3. int4 is compressed-tensors' way
# to hold four bits, whose products transformers computes in float32.
LIMITS = {"f32": 1e-4, "f16": 1e-4, "int4": 1e-4, "bf16": 0.02, "q8_0": 0.02, "q4_0": 0.02}
CODED = 0.02  # other encodings, which we do not write
SHARE = 0.1  # of what four bits cost themselves: so much more may the runtime add
LEAST = -103.3  # logarithm of the smallest float32: a runtime's zero is printed as any number below
KNOWN = {"</s>": "llama.cpp reads </s> as the end of a text in any vocabulary that spells it"}


@dataclass(frozen=True)
class Ids:
    """Token ids of the same texts by two tokenizers.

    Attributes:
        texts: how many were compared.
        differ: texts whose ids differ for no known reason.
        known: texts whose ids differ, and the known reason.
    """

    texts: int
    differ: tuple[str, ...]
    known: dict[str, str]


@dataclass(frozen=True)
class Distance:
    """How far one model's distributions lie from another's.

    Attributes:
        positions: how many were compared.
        kl: mean KL(ours ‖ theirs), nats.
        kl_max: the largest.
        agreement: share of positions with the same likeliest token.
        total: of the runtime's printed probabilities, the sum that is farthest from 1.
    """

    positions: int
    kl: float
    kl_max: float
    agreement: float
    total: float


def compare_ids(
    texts: Sequence[str], ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], own: Collection[str] = ()
) -> Ids:
    """Which texts have other ids, those with a known reason apart.

    Args:
        own: control tokens of the model itself, which nothing excuses.
    """
    apart = [text for text, one, other in zip(texts, ours, theirs, strict=True) if list(one) != list(other)]
    known = {sign: why for sign, why in KNOWN.items() if sign not in own}
    reasons = {text: next((why for sign, why in known.items() if sign in text), "") for text in apart}
    return Ids(len(texts), tuple(text for text in apart if not reasons[text]), {t: why for t, why in reasons.items() if why})


def distance(logp_PV: Any, logq_PV: Any) -> Distance:
    """KL and agreement at P positions; NaN in `logq_PV`: the runtime names no such token, which counts as impossible.

    Log-probabilities have few digits, printed ones fewer, so both are normalised first; `total` says how far theirs were.

    Args:
        logp_PV: ours.
        logq_PV: the runtime's, as it prints them.
    """
    ours_PV = _normalised(np.asarray(logp_PV, np.float64))
    printed_PV = np.nan_to_num(np.asarray(logq_PV, np.float64), nan=-np.inf)
    theirs_PV = _normalised(printed_PV)
    sums_P = np.exp(printed_PV).sum(-1)
    kl_P = (np.exp(ours_PV) * (ours_PV - theirs_PV)).sum(-1)
    same_P = ours_PV.argmax(-1) == theirs_PV.argmax(-1)
    farthest = float(sums_P[np.abs(sums_P - 1).argmax()])
    return Distance(len(kl_P), float(kl_P.mean()), float(kl_P.max()), float(same_P.mean()), farthest)


def _normalised(logp_PV: Any) -> Any:
    logp_PV = np.maximum(logp_PV, LEAST)
    return logp_PV - np.log(np.exp(logp_PV).sum(-1, keepdims=True))


def limit(type: str, own_kl: float | None = None) -> float:
    """The largest mean KL with which a file of a type passes.

    Args:
        type: of the matrices, such as "q4_0".
        own_kl: what the rounding itself cost the model, at the same positions; None: not known.
    """
    fixed = LIMITS.get(type, CODED)
    return fixed if own_kl is None else max(fixed, SHARE * own_kl)


def verdict(type: str, ids: Ids, found: Distance, own_kl: float | None = None, said: Sequence[str] = ()) -> str:
    """Why a file fails, in words; "" where it passes.

    Args:
        said: what else is wrong with it.
    """
    why = [*said]
    if ids.differ:
        shown = ", ".join(repr(text[:30]) for text in ids.differ[:3])
        why.append(f"token ids of {len(ids.differ)} of {ids.texts} texts differ, such as {shown}")
    if abs(found.total - 1) > 0.01:
        why.append(f"the runtime's probabilities sum to {found.total:.3f}")
    if not found.kl <= limit(type, own_kl):  # NaN fails
        why.append(f"mean KL {found.kl:.3g} is above {limit(type, own_kl):.3g} for {type}")
    return "; ".join(why)
