"""Write the four-bit student as a transformers folder and as GGUF, with a model card that carries the study.

python examples/06_export.py [FOLDER]
"""

from pathlib import Path

from tiny import need, out_folder

import potstill


def main(out: Path) -> None:
    kd4, study = need(out, "kd4", "study")
    export = potstill.run_stage(
        potstill.Export(model=kd4, formats=(potstill.Safetensors(), potstill.Gguf()), study=study),
        into=out / "export",
    )
    for name, (size, _) in export.summary["files"].items():
        print(f"{size:>9,} bytes  {name}")


if __name__ == "__main__":
    main(out_folder())
