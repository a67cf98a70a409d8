"""How near `potstill plan` comes: its memory and time for each stage against what the stage then took.

    python benchmarks/plan.py RECIPE [RECIPE …] [--save FILE]

Each recipe is planned, then run in a process of its own in a temporary folder. Times are of this machine at this moment.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _bench import facts


def compared(recipe: str) -> list[dict[str, object]]:
    """One line for each stage of a recipe: planned and measured."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        potstill = [sys.executable, "-m", "potstill"]
        planned = subprocess.run([*potstill, "plan", recipe, "--out", str(run), "--json"], check=True, capture_output=True)
        subprocess.run([*potstill, "run", recipe, "--out", str(run), "--quiet"], check=True, stdout=subprocess.DEVNULL)
        made = {}
        for file in run.glob("artifacts/[!.]*/artifact.json"):
            manifest = json.loads(file.read_text())
            made[manifest["name"]] = manifest
    lines = []
    for row in json.loads(planned.stdout):
        took = made[row["stage"]]
        lines.append(
            {
                "stage": row["stage"],
                "planned_gb": round((row["memory_bytes"] or 0) / 1e9, 2),
                "measured_gb": round(took["peak_memory_bytes"] / 1e9, 2),
                "planned_s": round(row["seconds"] or 0, 1),
                "measured_s": round(took["seconds"], 1),
            }
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--save", type=Path, help="write the figures to a file")
    options = parser.parse_args()
    found = {Path(recipe).stem: compared(recipe) for recipe in options.recipes}
    print(f"{'recipe':<12} {'stage':<12} {'planned GB':>10} {'measured':>9} {'ratio':>6} {'planned s':>10} {'measured':>9}")
    for name, lines in found.items():
        for line in lines:
            planned, measured = float(str(line["planned_gb"])), float(str(line["measured_gb"]))
            ratio = f"{planned / measured:.2f}" if planned else ""
            print(
                f"{name:<12} {line['stage']:<12} {planned:>10.2f} {measured:>9.2f} {ratio:>6} "
                f"{line['planned_s']:>10} {line['measured_s']:>9}"
            )
    if options.save is not None:
        options.save.write_text(json.dumps({"recipes": found, **facts()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
