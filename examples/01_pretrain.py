"""Train a tokenizer and two base models on prompts alone, so that there is something to teach and something to distil.

python examples/01_pretrain.py [FOLDER]
"""

from pathlib import Path

from tiny import DATA, PROMPTS, out_folder

import potstill


def main(out: Path) -> None:
    optim = potstill.Optim(lr=2e-3, epochs=1, warmup=0.05)
    big = potstill.run_stage(
        potstill.Pretrain(
            data=DATA,
            prompts=PROMPTS,
            shape=potstill.Shape(hidden_size=64, layers=2, heads=4, kv_heads=2, intermediate_size=128, positions=128),
            vocab_size=500,
            optim=optim,
        ),
        into=out / "big",
    )
    # The same tokenizer: white-box distillation compares two models token by token.
    base = potstill.run_stage(
        potstill.Pretrain(
            data=DATA,
            prompts=PROMPTS,
            tokenizer=big,
            shape=potstill.Shape(hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=64, positions=128),
            optim=optim,
        ),
        into=out / "base",
    )
    for model in (big, base):
        print(f"{model.name}: {model.summary['parameters']:,} parameters, {model.summary['vocabulary']} tokens, {model.folder}")


if __name__ == "__main__":
    main(out_folder())
