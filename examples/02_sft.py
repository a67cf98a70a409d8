"""Fine-tune the teacher on its task, and the control that distillation has to beat.

python examples/02_sft.py [FOLDER]
"""

from pathlib import Path

from tiny import DATA, PROMPTS, QUICK, need, out_folder

import potstill


def main(out: Path) -> None:
    big, base = need(out, "big", "base")
    optim = potstill.Optim(lr=4e-3, epochs=14, batch_size=8, warmup=0.05)
    for name, model in (("teacher", big), ("sft", base)):
        tuned = potstill.run_stage(
            potstill.SFT(model=model, data=DATA, prompts=PROMPTS, optim=optim, validation=QUICK, seed=1),
            into=out / name,
        )
        print(f"{name}: {tuned.summary['steps']} steps, {tuned.summary['response_tokens']:,} response tokens learned")


if __name__ == "__main__":
    main(out_folder())
