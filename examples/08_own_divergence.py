"""A new divergence is one class: recipes, `potstill list` and the API know it as soon as it is defined.

python examples/08_own_divergence.py [FOLDER]
"""

from pathlib import Path

from tiny import DATA, PROMPTS, QUICK, need, out_folder
from torch import Tensor

import potstill


class SquaredHellinger(potstill.Divergence, kind="squared_hellinger"):
    """½ Σ (√p − √q)², 0 to 1 per token; p teacher, q student. Hellinger, 1909."""

    def __call__(self, logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
        return 0.5 * ((logp_NV / 2).exp() - (logq_NV / 2).exp()).square().sum(-1)


def main(out: Path) -> None:
    base, teacher = need(out, "base", "teacher")
    student = potstill.run_stage(
        potstill.Distill(
            student=base,
            teacher=teacher,
            divergence="squared_hellinger",  # as a recipe would write it; SquaredHellinger() does too
            data=DATA,
            prompts=PROMPTS,
            optim=potstill.Optim(lr=5e-3, steps=12),
            validation=QUICK,
        ),
        into=out / "hellinger",
    )
    print(student.stage["divergence"])


if __name__ == "__main__":
    main(out_folder())
