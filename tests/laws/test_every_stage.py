"""A stage describes itself: whatever trains is seen by plan, study, sweep and closing line, under whatever name."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_parts import save_pair, write_rows
from tiny_rewards import tiny_rewards

import potstill
from potstill.commands.plan import estimate
from potstill.core.artifact import Artifact
from potstill.edges.models import PACKED, load_model, load_tokenizer, save_model
from potstill.quant.layers import quantise_model
from potstill.quant.packed import save_packed
from potstill.recipe.parse import parse_recipe
from potstill.run.runner import run_recipe
from potstill.stages import Stage
from potstill.stages.distill import Distill
from potstill.stages.known import question_hash, trained_rows
from potstill.stages.outlook import Outlook
from potstill.study.records import Study, Trained

SOURCE = Path(potstill.__file__).parent
OPTIM = {"steps": 3, "batch_size": 4, "lr": 1e-3}
VALIDATION = {"times": 1, "rows": 4, "max_new_tokens": 4}
TRAINS = sorted(kind for kind, cls in Stage.kinds.items() if "optim" in cls.model_fields)


@pytest.fixture(scope="module", autouse=True)
def rewards() -> Iterator[None]:
    with tiny_rewards():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    save_pair(folder)
    write_rows(folder / "rows.jsonl")
    save_quantised(folder)
    return folder


def save_quantised(root: Path) -> None:
    """The student with those layers in four bits whose width divides into groups, in the folder `four`."""
    model, tokenizer = load_model(f"path:{root}/student"), load_tokenizer(f"path:{root}/student")
    rows = [{"input_ids": torch.arange(8)[None], "attention_mask": torch.ones(1, 8, dtype=torch.long)}]
    packed = quantise_model(model, rows, method="rtn").packed
    save_model(model, tokenizer, root / "four")
    save_packed(packed, root / "four" / PACKED)


def fields(root: Path, kind: str) -> dict[str, Any]:
    """A small stage of each kind that trains; a new kind adds its own models here."""
    models = {
        "pretrain": {
            "text": "rows",
            "shape": {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 32},
        },
        "sft": {"model": f"path:{root}/student", "validation": VALIDATION},
        "grpo": {
            "model": f"path:{root}/student",
            "rewards": ["vowels"],
            "samples": {"per_prompt": 2, "max_new_tokens": 8},
            "policy": "paper",
            "probe_rows": 0,
            "validation": VALIDATION,
        },
    }
    models["heal"] = {"student": f"path:{root}/four", "teacher": f"path:{root}/teacher", "validation": VALIDATION}
    taught = {"student": f"path:{root}/student", "teacher": f"path:{root}/teacher", "validation": VALIDATION}
    return {"name": "it", "kind": kind, "optim": OPTIM, **models.get(kind, taught)}


def table(root: Path, *stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    data = {"kind": "jsonl", "path": str(root / "rows.jsonl"), "language": "en", "splits": {"validation": 0.2, "test": 0.3}}
    prompts = {"max_tokens": 128, "max_prompt_tokens": 96}
    return {"name": "law", "data": data, "prompts": prompts, "stage": list(stages), **more}


def run(root: Path, folder: Path, *stages: dict[str, Any], **more: Any) -> dict[str, Artifact]:
    return run_recipe(parse_recipe(table(root, *stages, **more)), folder)


@pytest.mark.parametrize("kind", TRAINS)
def test_whatever_trains_says_so(root: Path, tmp_path: Path, kind: str) -> None:
    recipe = parse_recipe(table(root, fields(root, kind)))
    (stage,) = recipe.stages
    cost = stage.cost(Outlook())
    assert (cost.steps or 0) == OPTIM["steps"]
    assert (cost.tokens or 0) > 0
    assert (cost.memory_bytes or 0) > 4 * (cost.parameters or 0) > 0
    (made,) = run_recipe(recipe, tmp_path).values()
    record = Trained.model_validate(made.summary["trained"])
    assert (record.by, record.steps, record.lr) == (kind, OPTIM["steps"], OPTIM["lr"])
    assert f"{OPTIM['steps']} steps" in stage.closing(made.summary)
    learned = {question_hash(row) for row in stage.learned_rows() if row.weight}
    assert learned == set(trained_rows(made.folder).tolist()) != set()  # what check looks for is what a study looks for


@pytest.mark.parametrize("kind", sorted(Stage.kinds))
def test_what_is_validated_can_be_swept_and_nothing_else(kind: str) -> None:
    cls = Stage.kinds[kind]
    assert getattr(cls, "validated", False) is ("validation" in cls.model_fields)


@pytest.fixture
def gkd() -> Any:
    class Gkd(Distill, kind="gkd_of_the_law"):
        """Distillation under another name."""

    yield Gkd
    del Stage.kinds["gkd_of_the_law"]


def studied(kd: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """A student, its control and what compares them."""
    control = {"name": "sft", "kind": "sft", "model": kd["student"], "optim": OPTIM, "validation": VALIDATION}
    rows = [{"name": "SFT", "role": "sft", "model": "stage:sft"}, {"name": "KD", "role": "kd", "model": "stage:it"}]
    study = {"name": "study", "kind": "evaluate", "study": rows, "metrics": ["nll"], "primary": "nll"}
    return control, kd, study, {"name": "report", "kind": "report", "study": "stage:study"}


def judged(folder: Path) -> dict[str, Any]:
    """All that a report says, but for what names the stage's kind."""
    report = json.loads((folder / "report.json").read_text())
    return {name: report[name] for name in ("headline", "verdicts", "caveats", "breakdown")}


@pytest.mark.parametrize("steps", [OPTIM["steps"], 2 * OPTIM["steps"]])
def test_a_subclass_under_another_name_is_judged_as_its_parent(root: Path, tmp_path: Path, gkd: Any, steps: int) -> None:
    done = {}
    for kind in ("distill", gkd.kind):
        kd = fields(root, kind) | {"optim": OPTIM | {"steps": steps}}
        done[kind] = run(root, tmp_path / kind, *studied(kd))
    parent, child = (done[kind]["it"] for kind in done)
    weights = [(artifact.folder / "model.safetensors").read_bytes() for artifact in (parent, child)]
    assert weights[0] == weights[1]
    records = [artifact.summary["trained"] for artifact in (parent, child)]
    assert records[0] | {"by": ""} == records[1] | {"by": ""}
    assert judged(tmp_path / "distill") == judged(tmp_path / gkd.kind)
    told = "NOT at equal tokens" in judged(tmp_path / gkd.kind)["headline"]["sentence"]
    assert told is (steps != OPTIM["steps"])
    kd_row = Study.load(done[gkd.kind]["study"].folder).with_role("kd")[0]
    assert kd_row.trained is not None


def test_a_subclass_is_planned_and_swept_as_its_parent(root: Path, tmp_path: Path, gkd: Any) -> None:
    plans = []
    for kind in ("distill", gkd.kind):
        swept = table(root, fields(root, kind), sweep={"it.optim.lr": [1e-3, 1e-4], "by": "validation_nll"})
        lines = estimate(parse_recipe(swept), tmp_path / "none", measure=False).lines
        plans.append([(line.stage, line.cost) for line in lines])
    assert plans[0] == plans[1]


def asked_of_kinds(tree: ast.AST, stages: set[str]) -> list[int]:
    """Lines that compare something's `kind`, or ask whether something is a stage of one kind."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(isinstance(side, ast.Attribute) and side.attr == "kind" and not of_a_metric(side) for side in sides):
                found += [node.lineno] if not all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops) else []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            names = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
            found += [node.lineno] if names & stages else []
    return found


def of_a_metric(attribute: ast.Attribute) -> bool:
    """A metric's kind is its name in a study, which a recipe's `primary` may say."""
    return isinstance(attribute.value, ast.Name) and attribute.value.id == "metric"


def test_nobody_outside_asks_a_stage_for_its_kind() -> None:
    stages = {cls.__name__ for cls in Stage.kinds.values()}
    allowed = {"core/component.py"}  # the registry itself
    found = {}
    for file in sorted(SOURCE.rglob("*.py")):
        name = str(file.relative_to(SOURCE))
        lines = asked_of_kinds(ast.parse(file.read_text(encoding="utf-8")), stages)
        if lines and name not in allowed:
            found[name] = lines
    assert found == {}


def test_the_law_sees_what_it_forbids() -> None:
    stages = {"Distill"}
    assert asked_of_kinds(ast.parse("a.kind == 'sft'\nb.kind in ('x',)\nisinstance(c, Distill)"), stages) == [1, 2, 3]
    assert asked_of_kinds(ast.parse("a.kind is None\nisinstance(c, str)"), stages) == []
