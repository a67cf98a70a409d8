"""Round the student to four bits by GPTQ, and see by layer what the solver gained over rounding.

python examples/04_quantize.py [FOLDER]
"""

from pathlib import Path

from tiny import DATA, PROMPTS, need, out_folder

import potstill


def main(out: Path) -> None:
    (kd,) = need(out, "kd")
    kd4 = potstill.run_stage(
        potstill.Quantize(model=kd, method="gptq", group=32, rows=32, data=DATA, prompts=PROMPTS),
        into=out / "kd4",
    )
    print(f"{kd4.summary['bits_per_weight']:g} bits per quantised weight")
    for layer in kd4.summary["layers"]:
        print(f"{layer['name']:<40} output error {layer['gptq_error']:.1e}, rounded {layer['rtn_error']:.1e}")


if __name__ == "__main__":
    main(out_folder())
