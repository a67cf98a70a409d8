"""An estimate of a training stage on several GPUs: memory of each, time, and what bounds the time; not measured."""

import math
import sys
from dataclasses import dataclass
from typing import Any

from potstill.core.progress import clock
from potstill.edges.models import Size
from potstill.losses.head import GPU_BYTES
from potstill.train.loop import MOST_TOKENS, Optim
from potstill.train.team import WHOLE_GRADIENTS_BYTES

NODE = 8  # GPUs of one machine, which talk faster than machines do


@dataclass(frozen=True)
class Cluster:
    """What is assumed.

    Attributes:
        gpus: one process each.
        tflops: bfloat16 arithmetic that a GPU really delivers, in 10¹² per second.
        gigabytes_s: what a GPU sends and receives in collectives; by default of NVLink up to 8 GPUs, else of a 400 Gbit/s link.
    """

    gpus: int
    tflops: float = 400.0
    gigabytes_s: float | None = None

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return 1e9 * (self.gigabytes_s or (300.0 if self.gpus <= NODE else 40.0))

    def share(
        self, size: Size, teacher: Size | None, optim: Optim, row_tokens: float, longest: int, step_flops: float, cut: bool
    ) -> dict[str, Any]:
        """Of one step, for the busiest GPU.

        Args:
            row_tokens: mean tokens of a row.
            longest: tokens of the longest row allowed.
            step_flops: of all GPUs together.
            cut: whether the teacher is sharded.
        """
        N = self.gpus
        busy = min(N, optim.batch_size)  # a process without rows waits for the others
        passes = max(1, math.ceil(math.ceil(optim.batch_size / busy) * row_tokens / (optim.micro_batch_tokens or MOST_TOKENS)))
        outside = size.embedding + size.head
        whole_gradients = 4 * size.parameters <= WHOLE_GRADIENTS_BYTES
        sent = passes * (2 * 2 * size.body + 4 * outside)  # blocks gathered in bfloat16 twice, the rest in float32 once
        sent += 4 * size.parameters * (1 if whole_gradients else passes)
        if teacher is not None and cut:
            sent += passes * 2 * teacher.body
        sent = sent * (N - 1) / N
        compute_s, traffic_s = step_flops / (busy * 1e12 * self.tflops), sent / self.bandwidth
        return {
            "gpu_memory_bytes": round(self._memory(size, teacher, optim, longest, passes, whole_gradients, cut)),
            "step_compute_s": compute_s,
            "step_traffic_s": traffic_s,
            "step_traffic_bytes": round(sent),
            "bound": "traffic" if traffic_s > compute_s else "compute" if busy == N else "rows",
        }

    def _memory(
        self, size: Size, teacher: Size | None, optim: Optim, longest: int, passes: int, whole_gradients: bool, cut: bool
    ) -> float:
        """Weights, gradients and Adam's averages sharded; gathered blocks; embedding, head and its gradient; activations;
        the fused head's buffers; the teacher. At least what loading takes, before anything is sharded."""
        N = self.gpus
        layers = max(1, size.active // (12 * size.hidden**2))
        held = 16 * size.parameters / N + 4 * size.vocab * size.hidden
        if N > 1:
            held += 4 * (size.embedding + size.head) + 2 * 2 * size.body / layers
            held += 4 * size.parameters if whole_gradients and passes > 1 else 0
        held += max(optim.micro_batch_tokens or MOST_TOKENS, longest) * layers * size.hidden * 16 * 4
        held += GPU_BYTES * (1 if teacher is None else 2)
        loading = 4.0 * size.parameters
        if teacher is not None:
            held += 2 * (teacher.body / N + teacher.embedding + teacher.head if cut else teacher.parameters)
            loading += 2 * teacher.parameters
        return max(held, loading)


def print_spread(name: str, cluster: Cluster, rows: list[dict[str, Any]]) -> None:
    """For a terminal: the training stages that are still to do."""
    from rich.console import Console
    from rich.table import Table

    todo = [row for row in rows if row["state"] != "done" and "bound" in row]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "kind"):
        table.add_column(column, no_wrap=True)
    for column in ("GB a GPU", "steps", "s a step", "traffic s", "time", "bound by"):
        table.add_column(column, justify="right", no_wrap=True)
    total = 0.0
    for row in todo:
        step = max(row["step_compute_s"], row["step_traffic_s"])
        total += row["steps"] * step
        table.add_row(
            row["stage"],
            row["kind"],
            f"{row['gpu_memory_bytes'] / 1e9:.1f}",
            f"{row['steps']:,}",
            f"{step:.2g}",
            f"{row['step_traffic_s']:.2g}",
            clock(row["steps"] * step),
            row["bound"],
        )
    console = Console(width=None if sys.stdout.isatty() else 110, markup=False)
    if not todo:
        notes = sorted({row["note"] for row in rows if row["note"]})
        left = [row for row in rows if row["state"] != "done"]
        console.print(f"{name}: {'no training is left to do' if not left else 'nothing can be said of the training left'}")
        for note in notes if left else ():
            console.print(note, highlight=False)
        return
    console.print(table)
    assumed = f"{cluster.tflops:g} TFLOP/s and {cluster.bandwidth / 1e9:g} GB/s a GPU"
    gpus = "1 GPU" if cluster.gpus == 1 else f"{cluster.gpus} GPUs"
    console.print(f"\n{name}: {clock(total)} of training on {gpus}, if each delivers {assumed}", highlight=False)
    console.print(
        "estimate: assumes that communication overlaps compute; not yet compared with a GPU; validation not counted",
        highlight=False,
    )
