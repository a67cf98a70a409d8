"""What other people's published losses find for the same logits; skipped where their packages are not installed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from potstill.divergences import Divergence

N, V, D = 7, 23, 5
KINDS: list[tuple[float, Any]] = [
    (0.0, "forward_kl"),
    (1.0, "reverse_kl"),
    (0.5, "generalised_jsd"),
    (0.1, {"kind": "generalised_jsd", "beta": 0.1}),
]


def ours(kind: Any, teacher: Tensor, student: Tensor) -> Tensor:
    return Divergence.parse(kind)(teacher.log_softmax(-1), student.log_softmax(-1)).mean()


@pytest.mark.parametrize(("beta", "kind"), KINDS)
def test_trl_finds_the_same(beta: float, kind: Any) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd", reason="needs trl: pip install 'potstill[bench]'")
    torch.manual_seed(0)
    teacher, student = torch.randn(N, V), torch.randn(N, V, requires_grad=True)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student[None], teacher[None], torch.zeros(1, N, dtype=torch.long), beta=beta)
    mine = ours(kind, teacher, student)
    torch.testing.assert_close(mine, theirs)
    (a,), (b,) = (torch.autograd.grad(loss, student) for loss in (mine, theirs))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("beta", "kind"), KINDS)
def test_liger_finds_the_same(beta: float, kind: Any) -> None:
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="needs liger-kernel: pip install 'potstill[bench]'")
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    other, theirs_VD = torch.randn(N, D), torch.randn(V, D)
    loss = chunked.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False, chunk_size=3)
    theirs = loss(hidden, weight, other, theirs_VD, torch.zeros(N, dtype=torch.long))
    mine = ours(kind, other @ theirs_VD.T, hidden @ weight.T)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(found, (hidden, weight)) for found in (mine, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
