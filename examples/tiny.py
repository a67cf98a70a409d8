"""What the examples share: a data set and prompts small enough for seconds, and the order in which they build on each other."""

import runpy
import sys
from pathlib import Path

import potstill

DATA = potstill.Primer(countries=6)
PROMPTS = potstill.Prompts(max_tokens=80, max_prompt_tokens=48)
QUICK = potstill.Validation(times=2, rows=8, max_new_tokens=16)

_MADE_BY = {
    "big": "01_pretrain.py",
    "base": "01_pretrain.py",
    "teacher": "02_sft.py",
    "sft": "02_sft.py",
    "kd": "03_distill.py",
    "kd4": "04_quantize.py",
    "study": "05_evaluate.py",
}


def need(out: Path, *names: str) -> list[str]:
    """References to what earlier examples left in `out`; those that have not run are run first."""
    for name in names:
        if not (out / name).is_dir():
            runpy.run_path(str(Path(__file__).with_name(_MADE_BY[name])))["main"](out)
    return [f"path:{out / name}" for name in names]


def out_folder() -> Path:
    """The folder named on the command line, else `runs/examples`."""
    return Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples")
