"""A new divergence is one class: recipes, `potstill list` and the API know it as soon as it is defined.

python examples/08_own_divergence.py [FOLDER]
"""

import math
from pathlib import Path

import torch
from pydantic import Field
from tiny import DATA, PROMPTS, QUICK, need, out_folder
from torch import Tensor

import potstill


class SkewKL(potstill.Divergence, kind="skew_kl"):
    """KL(p ‖ αp + (1−α)q) in nats per token; p teacher, q student. DistiLLM, arXiv:2402.03898."""

    alpha: float = Field(default=0.1, gt=0, lt=1, description="share of the teacher in the mixture")

    def __call__(self, logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
        logm_NV = torch.logaddexp(logp_NV + math.log(self.alpha), logq_NV + math.log1p(-self.alpha))
        # the clamp keeps 0·log 0 at 0 where a distribution has no mass
        return (logp_NV.exp() * (logp_NV.clamp_min(-1e4) - logm_NV.clamp_min(-1e4))).sum(-1)


def main(out: Path) -> None:
    base, teacher = need(out, "base", "teacher")
    student = potstill.run_stage(
        potstill.Distill(
            student=base,
            teacher=teacher,
            divergence={"kind": "skew_kl", "alpha": 0.2},  # as a recipe would write it; SkewKL(alpha=0.2) does too
            data=DATA,
            prompts=PROMPTS,
            optim=potstill.Optim(lr=5e-3, steps=12),
            validation=QUICK,
        ),
        into=out / "skew",
    )
    print(student.stage["divergence"])


if __name__ == "__main__":
    main(out_folder())
