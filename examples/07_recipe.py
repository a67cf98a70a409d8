"""Check a recipe, see all of its mistakes at once, mend it, run it, and run it again for nothing.

python examples/07_recipe.py [FOLDER]
"""

import tomllib
from pathlib import Path

from tiny import out_folder

import potstill

RECIPE = """
name = "two-seeds"
seeds = [1, 2]
data = { kind = "primer", countries = 4 }
prompts = { max_tokens = 80, max_prompt_tokens = 48 }

[[stage]]
name = "base"
kind = "pretrain"
shape = { hidden_size = 32, layers = 1, heads = 2, kv_heads = 1, intermediate_size = 64, positions = 128 }
vocab_size = 400
optim = { epochs = 1, lr = 2e-3 }

[[stage]]
name = "sft"
kind = "sft"
model = "stage:base"
per_seed = true
optim = { lr = 5e-3, steps = 8 }
validation = { times = 0 }
"""


def main(out: Path) -> None:
    wrong = tomllib.loads(RECIPE.replace("epochs = 1", "epoch = 1").replace("stage:base", "stage:bsae"))
    try:
        potstill.parse_recipe(wrong, "two-seeds.toml")
    except potstill.RecipeError as error:
        print(error)
    recipe = potstill.parse_recipe(tomllib.loads(RECIPE), "two-seeds.toml", overrides=("sft.optim.batch_size=16",))
    first = potstill.run_recipe(recipe, out / "two-seeds")
    again = potstill.run_recipe(recipe, out / "two-seeds")  # finished stages are found, not redone
    assert [artifact.created for artifact in first.values()] == [artifact.created for artifact in again.values()]
    for ident, artifact in first.items():
        print(f"{ident:<6} {artifact.kind:<9} {artifact.folder.name}")


if __name__ == "__main__":
    main(out_folder())
