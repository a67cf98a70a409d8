"""Let the teacher read the rows once, then distil by two divergences from what it said.

python examples/09_teacher_cache.py [FOLDER]
"""

from pathlib import Path

from tiny import DATA, PROMPTS, need, out_folder

import potstill


def main(out: Path) -> None:
    base, teacher = need(out, "base", "teacher")
    said = potstill.run_stage(potstill.Cache(teacher=teacher, data=DATA, prompts=PROMPTS), into=out / "said")
    print(f"said: {said.summary['rows']:,} rows in {said.summary['bytes']:,} bytes")
    for name, divergence in (("forward", potstill.ForwardKL()), ("reverse", potstill.ReverseKL())):
        kd = potstill.run_stage(
            potstill.Distill(
                student=base,
                teacher=teacher,
                cache=said,
                divergence=divergence,
                data=DATA,
                prompts=PROMPTS,
                optim=potstill.Optim(lr=4e-3, epochs=2, batch_size=8),
                validation=potstill.Validation(times=0),
            ),
            into=out / f"kd-{name}",
        )
        signal = kd.summary["signal"]
        assert signal["rows_computed"] == 0  # the teacher's body was not even loaded
        print(f"{name}: {signal['rows_read']:,} rows read back")


if __name__ == "__main__":
    main(out_folder())
