"""Attention inside packed rows, five ways: which one final_hidden should use on this machine.

    python benchmarks/attention.py
    python benchmarks/attention.py --precision bf16

One layer's attention, forward and backward, over rows of uneven lengths end to end: `grouped`, one call per distinct length,
as potstill does: of SDPA, or in bfloat16 on a CPU of plain products; `sdpa`, the same by SDPA alone; `mask`, one call over
the whole with a block-diagonal causal mask; `padded`, one call over rows padded to the longest; `varlen`, torch's
variable-length kernel, where this build and device have it (CUDA, 16 bits). Values are compared first; ways take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _bench import add_output, hand_over, shown, synchronize, table
from torch import Tensor

from potstill.edges import attention
from potstill.edges.attention import attend_within

HEADS, WIDTH = 8, 64


def lengths_of(rows: int, mean: int, seed: int = 0) -> list[int]:
    """Sorted as micro-batches are; spread as instruction rows are, a few of them long."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.exp(0.8 * torch.randn(rows, generator=draw))
    return sorted(max(8, int(mean * value / spread.mean())) for value in spread)


def grouped(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    return attend_within(q, k, v, lengths)


def sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    longest, attention.LONGEST = attention.LONGEST, 0
    try:
        return attend_within(q, k, v, lengths)
    finally:
        attention.LONGEST = longest


def mask(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    row_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    allowed_TT = (row_T[:, None] == row_T[None, :]).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed_TT)[0].transpose(0, 1)


def padded(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    def rows(t: Tensor) -> Tensor:
        parts = t[0].transpose(0, 1).split(lengths)
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).transpose(1, 2)

    out = F.scaled_dot_product_attention(rows(q), rows(k), rows(v), is_causal=True).transpose(1, 2)
    return torch.cat([out[i, :length] for i, length in enumerate(lengths)])


def varlen(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *lengths]).cumsum(0).to(q.device, torch.int32)
    parts = (t[0].transpose(0, 1).contiguous() for t in (q, k, v))
    return varlen_attn(*parts, ends, ends, max(lengths), max(lengths), window_size=(-1, 0))


def timed(way: Callable[..., Tensor], parts: list[Tensor], lengths: list[int], device: Any) -> float:
    synchronize(device)
    begin = time.perf_counter()
    way(*parts, lengths).float().square().sum().backward()
    synchronize(device)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output(parser)
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, else fp32")
    words = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = words.precision or ("bf16" if device.type == "cuda" else "fp32")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    ways: dict[str, Callable[..., Tensor]] = {"grouped": grouped, "sdpa": sdpa, "mask": mask, "padded": padded}
    if device.type == "cuda":
        ways["varlen"] = varlen
    found: dict[str, Any] = {"precision": precision, "shapes": {}}
    lines, every = [], []
    for rows, mean in ((8, 120), (32, 120), (64, 120), (16, 500)):
        lengths = lengths_of(rows, mean)
        torch.manual_seed(0)
        parts = [torch.randn(1, HEADS, sum(lengths), WIDTH, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
        with torch.no_grad():
            values = {name: way(*parts, lengths) for name, way in ways.items()}
        gap = max(float((value - values["grouped"]).abs().max()) for value in values.values())
        assert gap < (1e-4 if dtype == torch.float32 else 5e-2), gap
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range((words.rounds or 5) + 1):
            for name, way in ways.items():
                times[name].append(timed(way, parts, lengths, device))
        ratios = {name: [b / a for a, b in zip(times["grouped"][1:], times[name][1:], strict=True)] for name in ways}
        found["shapes"][f"{rows} rows of {mean}"] = {name: statistics.median(values) for name, values in ratios.items()}
        every.append(times)
        lines.append(
            [f"{rows} rows, {mean} tokens on average", *(f"{shown(ratios[name])}×" for name in ways if name != "grouped")]
        )
    table(["rows", *(f"{name} takes longer than grouped" for name in ways if name != "grouped")], lines)
    hand_over(found, every, words)


if __name__ == "__main__":
    main()
