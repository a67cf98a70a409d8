"""Write `docs/reference.md` from the classes themselves: `python docs/generate.py` (or `make docs`)."""

from pathlib import Path
from typing import Any

from potstill.commands.list import components, fields_of, toml
from potstill.recipe.header import Header
from potstill.sources import Source
from potstill.sources._columns import Columns
from potstill.stages.base import DataStage, Stage
from potstill.stages.readers import Row

PAGE = Path(__file__).with_name("reference.md")

HEAD = """\
# Reference

Every field of every component, made from the classes by `make docs`. The same is printed by `potstill list`, and by
`potstill list --json` for programs. A field with a dot belongs to a group, written as a table:
`optim = { lr = 1e-4, epochs = 3 }`. How recipes are put together is told in [the recipe language](recipe.md).
"""

ROLES = {
    "stage": ("Stages", "What `kind` of a `[[stage]]` can be."),
    "source": ("Sources", "What `data = { kind = … }` can be; see [data](data.md)."),
    "divergence": ("Divergences", "What `divergence = { kind = … }` can be; see [distillation](distillation.md)."),
    "init": ("Inits", "What `init = { kind = … }` can be; see [distillation](distillation.md)."),
    "metric": ("Metrics", "What `metrics = [ … ]` of an evaluate stage can hold; see [evaluation](evaluation.md)."),
    "reward": ("Rewards", "What `rewards = [ … ]` of a stage that learns by rewards can hold; see [rewards](rewards.md)."),
    "exporter": ("Exporters", "What `formats = [ … ]` of an export stage can hold; see [quantisation](quantization.md)."),
}


def page() -> str:
    """The whole page."""
    every_stage = [field for field in fields_of(Stage) if field["name"] != "kind"]
    every_data_stage = [field for field in fields_of(DataStage) if field["name"] not in names(every_stage)]
    parts = [HEAD, "## Recipe", "The fields at the top of a recipe, before the first `[[stage]]`.", table(fields_of(Header))]
    for role, kinds in components().items():
        title, told = ROLES[role]
        parts += [f"## {title}", told]
        shared: list[dict[str, Any]] = []
        columns = [field for field in fields_of(Columns) if field not in fields_of(Source)]
        if role == "stage":
            parts += ["### Fields of every stage", table(every_stage)]
            parts += [
                "### Fields of every stage that reads rows",
                "All but `best`, `device`, `export` and `report`.",
                table(every_data_stage),
            ]
            shared = every_stage + every_data_stage
        elif role == "source":
            shared = [
                field
                for field in next(iter(kinds.values()))["fields"]
                if field["name"].startswith(("splits", "share", "limit"))
            ]
            parts += ["### Fields of every source", table(shared)]
            kinds_of_columns = [f"`{kind}`" for kind, cls in sorted(Source.kinds.items()) if issubclass(cls, Columns)]
            parts += ["### Fields of sources with columns", f"Of {', '.join(kinds_of_columns)}.", table(columns)]
        for kind, described in kinds.items():
            from_above = shared + (columns if role == "source" and issubclass(Source.kinds[kind], Columns) else [])
            own = [field for field in described["fields"] if field not in from_above]
            parts += [f"### `{kind}`", described["summary"], table(own)]
            if kind == "evaluate":
                parts += ["Each entry of `study`:", table(fields_of(Row))]
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def names(fields: list[dict[str, Any]]) -> set[str]:
    return {field["name"] for field in fields}


def table(fields: list[dict[str, Any]]) -> str:
    """A Markdown table of fields; a sentence where there are none."""
    if not fields:
        return "No fields of its own."
    rows = [
        f"| `{field['name']}` | {cell(field['type'])} | {'needed' if field['required'] else default(field['default'])} "
        f"| {cell(field['description'])} |"
        for field in fields
    ]
    return "\n".join(["| field | type | default | meaning |", "|---|---|---|---|", *rows])


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def default(value: Any) -> str:
    return f"`{cell(toml(value))}`" if value is not None else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
