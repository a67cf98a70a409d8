"""A recipe that runs in a second, and the command line in this process."""

import json
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner, Result

RECIPE = """
name = "tiny"
data = { kind = "jsonl", path = "ROWS" }
prompts = { max_tokens = 64, max_prompt_tokens = 40 }

[[stage]]
name = "base"
kind = "pretrain"
shape = { hidden_size = 16, layers = 1, heads = 2, kv_heads = 1, intermediate_size = 32, positions = 128 }
vocab_size = 300
optim = { steps = 2, batch_size = 8 }

[[stage]]
name = "sft"
kind = "sft"
model = "stage:base"
optim = { steps = 4, batch_size = 8 }
validation = { times = 0 }
"""


@dataclass(frozen=True)
class Place:
    """A folder with `tiny.toml` and its rows; runs go to `run`."""

    folder: Path

    @property
    def recipe(self) -> str:
        return str(self.folder / "tiny.toml")

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def add(self, toml: str) -> None:
        """Append to the recipe."""
        path = Path(self.recipe)
        path.write_text(path.read_text() + toml)

    def run(self, *words: str) -> Result:
        return call("run", self.recipe, "--out", str(self.out), *words)

    def artifacts(self) -> list[str]:
        """Names of the finished artifacts' folders."""
        return sorted(path.parent.name for path in self.out.glob("artifacts/[!.]*/artifact.json"))

    def artifact(self, name: str) -> Path:
        (found,) = self.out.glob(f"artifacts/{name}-*")
        return found


def call(*words: str) -> Result:
    """The command line, in this process; a crash of ours is raised here."""
    from potstill.cli import main

    return CliRunner().invoke(main, list(words), catch_exceptions=False)


def set_up(folder: Path) -> Place:
    place = Place(folder)
    rows = [{"instruction": f"What is {i} plus {i % 7}?", "response": f"It is {i + i % 7}."} for i in range(60)]
    place.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path(place.recipe).write_text(RECIPE.replace("ROWS", str(place.rows)))
    return place
