"""Distil the teacher into the student: same rows, order, steps and seed as the control of 02_sft.py.

python examples/03_distill.py [FOLDER]
"""

from pathlib import Path

from tiny import DATA, PROMPTS, QUICK, need, out_folder

import potstill


def main(out: Path) -> None:
    base, teacher, control = need(out, "base", "teacher", "sft")
    kd = potstill.run_stage(
        potstill.Distill(
            student=base,
            teacher=teacher,
            divergence=potstill.ForwardKL(),
            ratio=0.5,
            temperature=1.0,
            data=DATA,
            prompts=PROMPTS,
            optim=potstill.Optim(lr=4e-3, epochs=14, batch_size=8, warmup=0.05),
            validation=QUICK,
            seed=1,
        ),
        into=out / "kd",
    )
    sft = potstill.Artifact.load(Path(control.removeprefix("path:")))
    assert kd.summary["response_tokens"] == sft.summary["response_tokens"]  # a fair comparison, by construction
    print(f"kd: {kd.summary['response_tokens']:,} response tokens, as many as its control")


if __name__ == "__main__":
    main(out_folder())
