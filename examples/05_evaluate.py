"""Measure all models on the same test rows, and let the report say whether distilling helped.

python examples/05_evaluate.py [FOLDER]
"""

import json
from pathlib import Path

from tiny import DATA, PROMPTS, need, out_folder

import potstill


def main(out: Path) -> None:
    base, sft, kd, kd4, teacher = need(out, "base", "sft", "kd", "kd4", "teacher")
    study = potstill.run_stage(
        potstill.Evaluate(
            study=(
                potstill.Row(name="Base", role="base", model=base),
                potstill.Row(name="SFT", role="sft", model=sft),
                potstill.Row(name="KD", role="kd", model=kd),
                potstill.Row(name="KD 4-bit", role="quantized", model=kd4),
                potstill.Row(name="Teacher", role="teacher", model=teacher),
            ),
            data=DATA,
            prompts=PROMPTS,
            metrics=("rouge_l", "exact_match", "nll", "kl_to_teacher"),
            decoding=potstill.Decoding(max_new_tokens=16),
        ),
        into=out / "study",
    )
    report = potstill.run_stage(potstill.Report(study=study), into=out / "report")
    found = json.loads((report.folder / "report.json").read_text(encoding="utf-8"))
    for row in found["rows"]:
        rouge = row["metrics"]["rouge_l"]
        print(f"{row['name']:<10} Rouge-L {rouge['value']:5.1f}  [{rouge['ci'][0]:.1f}, {rouge['ci'][1]:.1f}]")
    print(found["headline"]["sentence"])
    print(report.folder / "report.html")


if __name__ == "__main__":
    main(out_folder())
