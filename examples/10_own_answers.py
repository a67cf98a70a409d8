"""Go on from the tuned student with answers that a model writes: its own (three ways), or its teacher's.

python examples/10_own_answers.py [FOLDER]
"""

from pathlib import Path

from tiny import DATA, PROMPTS, need, out_folder

import potstill

NEW = 12  # tokens of an answer, at most


def main(out: Path) -> None:
    student, teacher = need(out, "sft", "teacher")
    shared = {
        "data": DATA,
        "prompts": PROMPTS,
        "optim": potstill.Optim(lr=1e-4, steps=4, batch_size=8),
        "validation": potstill.Validation(times=0),
    }
    stages = {
        "own": potstill.Distill(student=student, teacher=teacher, samples={"share": 0.5, "max_new_tokens": NEW}, **shared),
        "minillm": potstill.MiniLLM(student=student, teacher=teacher, samples={"max_new_tokens": NEW}, **shared),
        "grpo": potstill.GRPO(model=student, rewards=["rouge_l"], samples={"per_prompt": 4, "max_new_tokens": NEW}, **shared),
    }
    for name, stage in stages.items():
        made = potstill.run_stage(stage, into=out / name)
        print(f"{name}: {made.summary['generated_tokens']:,} tokens written, {made.summary['steps']} steps")
    said = potstill.run_stage(
        potstill.Generate(model=teacher, data=DATA, prompts=PROMPTS, sampling={"max_new_tokens": NEW}), into=out / "written"
    )
    tuned = potstill.run_stage(
        potstill.SFT(model=student, **{**shared, "data": f"path:{said.folder}"}), into=out / "sft-on-written"
    )
    print(f"written: {said.summary['answers']:,} answers, of which {tuned.summary['rows']:,} were learned")


if __name__ == "__main__":
    main(out_folder())
