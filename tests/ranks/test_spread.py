"""What a plan says of many GPUs, against numbers worked out by hand."""

import pytest

from potstill.commands.spread import Cluster
from potstill.edges.models import Size
from potstill.train.loop import Optim

SIZE = Size(body=24_000_000, embedding=1_000_000, head=0, hidden=1000, vocab=1000)  # two layers
OPTIM = Optim(batch_size=16, micro_batch_tokens=100)


def share(cluster: Cluster, teacher: Size | None = None, cut: bool = False) -> dict:
    return cluster.share(SIZE, teacher, OPTIM, row_tokens=50.0, longest=100, step_flops=8e12, cut=cut)


def test_one_gpu_sends_nothing_and_its_time_is_that_of_its_arithmetic():
    found = share(Cluster(1, tflops=400))
    assert found["step_traffic_bytes"] == 0
    assert found["step_compute_s"] == pytest.approx(0.02)
    assert found["bound"] == "compute"


def test_four_gpus_gather_and_reduce_in_every_pass():
    found = share(Cluster(4, tflops=400, gigabytes_s=1))
    # four rows of 50 tokens each in micro-batches of 100: two passes
    gathered = 2 * (2 * 2 * 24_000_000 + 4 * 1_000_000)
    assert found["step_traffic_bytes"] == (gathered + 4 * 25_000_000) * 3 // 4
    assert found["step_compute_s"] == pytest.approx(0.005)
    assert found["bound"] == "traffic"
    cut = share(Cluster(4, gigabytes_s=1), SIZE, cut=True)
    assert cut["step_traffic_bytes"] - found["step_traffic_bytes"] == 2 * 2 * 24_000_000 * 3 // 4


def test_more_gpus_than_rows_bring_nothing():
    found = share(Cluster(64, gigabytes_s=1e6))
    assert found["step_compute_s"] == share(Cluster(16, gigabytes_s=1e6))["step_compute_s"]
    assert found["bound"] == "rows"


def passes_kept(gpus: int) -> int:
    """Whole gradients are kept where a step has several passes: 16 / gpus rows of 50 tokens in micro-batches of 100."""
    return int(16 / gpus * 50 > 100)


def test_memory_falls_with_the_number_of_gpus_to_what_is_not_sharded():
    held = [share(Cluster(n))["gpu_memory_bytes"] for n in (2, 4, 8)]
    states = 16 * 25_000_000
    assert held[0] - held[1] == states // 4
    assert held[1] - held[2] == states // 8 + 4 * 25_000_000 * (passes_kept(4) - passes_kept(8))
    whole, cut = (share(Cluster(8), SIZE, cut=cut)["gpu_memory_bytes"] for cut in (False, True))
    assert whole - cut == 2 * 24_000_000 * 7 // 8
