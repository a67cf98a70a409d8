"""What training took: against the operations that PyTorch counts, against the plan, and at every validation."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_parts import save_pair
from tiny_rewards import tiny_rewards
from torch.utils.flop_counter import FlopCounterMode

from potstill.core.artifact import Artifact
from potstill.recipe.parse import parse_recipe
from potstill.run.runner import run_recipe
from potstill.stages.lineage import Place, curve
from potstill.stages.outlook import Outlook

NEW = 8
OPTIM = {"batch_size": 8, "lr": 1e-4, "schedule": "constant"}


@pytest.fixture(scope="module", autouse=True)
def rewards() -> Iterator[None]:
    with tiny_rewards():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spent")
    save_pair(folder, 32, 64)
    # of one length, so that nothing is padded where prompts are read together
    rows = [{"instruction": f"What is {i} plus {i % 7}?", "response": f"It is {i + i % 7}."} for i in range(120, 240)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    # models are looked at once in a process, which is not to be counted
    made(folder, folder / "once", stages(folder, kind="distill", signal="live", optim=OPTIM | {"steps": 1}))
    return folder


def stages(root: Path, **fields: Any) -> dict[str, Any]:
    kind = fields["kind"]
    models = {"model": f"path:{root}/student"} if kind in ("sft", "grpo") else {"student": f"path:{root}/student"}
    if kind not in ("sft", "grpo") or "beta_kd" in fields.get("policy", {}):
        models |= {"teacher": f"path:{root}/teacher"}
    if kind == "grpo" and fields.get("policy") == "deepseek":
        models["reference"] = f"path:{root}/teacher"
    return {"name": "it", **models, "validation": {"times": 0}, **fields}


def made(root: Path, out: Path, *tables: dict[str, Any]) -> dict[str, Artifact]:
    return run_recipe(recipe(root, *tables), out)


def recipe(root: Path, *tables: dict[str, Any]) -> Any:
    data = {"kind": "jsonl", "path": str(root / "rows.jsonl"), "language": "en", "splits": {"validation": 0.1, "test": 0.1}}
    return parse_recipe(
        {"name": "spent", "data": data, "prompts": {"max_tokens": 96, "max_prompt_tokens": 64}, "stage": list(tables)}
    )


def curve_of(artifact: Artifact) -> dict[str, Any]:
    return curve("it", "kd", Place(f"path:{artifact.folder}", artifact))


GRPO = {"kind": "grpo", "rewards": ["vowels"], "probe_rows": 0}
GRPO |= {"samples": {"max_new_tokens": NEW, "updates": 2, "per_prompt": 2}}
ONE = {"samples": {"max_new_tokens": NEW, "updates": 1, "per_prompt": 2}}
ARMS: dict[str, dict[str, Any]] = {
    "checkpointed": {"kind": "sft", "optim": {"activation_checkpointing": True}},
    "hidden": {"kind": "distill"},
    "topk": {"kind": "distill", "signal": "topk", "top_k": 8},
    "own": {"kind": "distill", "samples": {"max_new_tokens": NEW}},
    "groups beside data": {"kind": "distill", "samples": {"share": 0.5, "per_prompt": 2, "max_new_tokens": NEW}},
    "minillm": {"kind": "minillm", "samples": {"max_new_tokens": NEW, "updates": 2, "per_prompt": 4}},
    "minillm alone": {
        "kind": "minillm",
        "samples": {"max_new_tokens": NEW, "updates": 2, "per_prompt": 2},
        "estimator": {"alpha": 0.0},
        "text": 0.0,
    },
    "grpo": GRPO | {"policy": {"cut": "counted"}},
    "grpo, drawn again": GRPO | {"policy": {"preset": "dr_grpo", "redraws": 2}, "rewards": ["odd"]},
    "grpo, one update": GRPO | ONE | {"policy": {"cut": "counted"}},
    "grpo of whole answers, one update": GRPO | ONE | {"policy": "paper"},
    "grpo of whole answers": GRPO | {"policy": "paper"},
    "grpo near both, one update": GRPO | ONE | {"policy": {"preset": "deepseek", "beta_kd": 0.1}},
    "grpo near another": GRPO | {"policy": "deepseek"},
    "grpo near another, one update": GRPO | ONE | {"policy": "deepseek"},
    "grpo near both": GRPO | {"policy": {"preset": "deepseek", "beta_kd": 0.1}},
}


@pytest.mark.parametrize("name", ARMS)
def test_operations_are_those_that_pytorch_counts(name: str, root: Path, tmp_path: Path) -> None:
    """Of two runs of unequal length, so that what begins and ends a stage falls out."""
    counted, reckoned = [], []
    for steps in (2, 6):
        fields = ARMS[name] | {"optim": OPTIM | {"steps": steps} | ARMS[name].get("optim", {})}
        with FlopCounterMode(display=False) as counter:
            (artifact,) = made(root, tmp_path / str(steps), stages(root, **fields)).values()
        counted.append(counter.get_total_flops())
        reckoned.append(curve_of(artifact)["spent"]["flops"])
    assert reckoned[1] - reckoned[0] == pytest.approx(counted[1] - counted[0], rel=0.1)


@pytest.mark.parametrize(
    "name", ["own", "groups beside data", "minillm", "grpo near both", "grpo near another", "grpo near another, one update"]
)
def test_the_plan_reckons_alike(name: str, root: Path, tmp_path: Path) -> None:
    """Where answers are as long as the references, which is what the plan takes them to be."""
    (sft,) = recipe(root, stages(root, kind="sft")).stages
    longest = round(sft.cost(Outlook()).rows[0].response)
    samples = {"samples": ARMS[name]["samples"] | {"max_new_tokens": longest}} if "samples" in ARMS[name] else {}
    fields = ARMS[name] | samples | {"optim": OPTIM | {"steps": 4} | ARMS[name].get("optim", {})}
    (artifact,) = made(root, tmp_path, stages(root, **fields)).values()
    (stage,) = recipe(root, stages(root, **fields)).stages
    assert curve_of(artifact)["spent"]["flops"] == pytest.approx(stage.cost(Outlook()).flops, rel=0.1)


@pytest.mark.parametrize("name", ["own", "groups beside data"])
def test_the_plan_lets_the_teacher_read_own_answers_in_every_step(name: str, root: Path) -> None:
    """Rows of data it reads once, and not again where an earlier stage had them read."""
    outlook, flops = Outlook(), list[float]()
    for steps in (40, 80, 120):  # of 8 rows: every row of data several times
        (stage,) = recipe(root, stages(root, **(ARMS[name] | {"optim": OPTIM | {"steps": steps}}))).stages
        flops.append(stage.cost(outlook).flops)
    first, second, third = flops
    assert third == pytest.approx(1.5 * second, rel=1e-6)
    assert second == pytest.approx(2 * first, rel=1e-6) if name == "own" else second < 1.99 * first


def test_every_validation_knows_what_was_taken(root: Path, tmp_path: Path) -> None:
    validation = {"times": 3, "rows": 4, "max_new_tokens": 4}
    fields = ARMS["groups beside data"] | {"optim": OPTIM | {"epochs": 1.0}, "validation": validation}
    (artifact,) = made(root, tmp_path, stages(root, **fields)).values()
    found = curve_of(artifact)
    validated = [point for point in found["points"] if "validation_nll" in point]
    assert len(validated) == 4
    for name in ("read", "written", "flops"):
        amounts = [point[name] for point in validated]
        assert amounts[0] == 0
        assert amounts == sorted(amounts)
        assert amounts[-1] == found["spent"][name] > 0
    assert found["spent"]["read"] == artifact.summary["tokens"]
    assert found["spent"]["written"] == artifact.summary["generated_tokens"]
    lengths = [point["samples_length"] for point in found["points"] if "samples_length" in point]
    assert len(lengths) == artifact.summary["steps"]


def test_lines_without_counts_are_read_in_proportion_to_steps(root: Path, tmp_path: Path) -> None:
    """As versions wrote them that counted only at the end."""
    fields = ARMS["own"] | {"optim": OPTIM | {"steps": 4}, "validation": {"times": 2, "rows": 4, "max_new_tokens": 4}}
    (artifact,) = made(root, tmp_path, stages(root, **fields)).values()
    file = artifact.folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    bare = [{k: v for k, v in line.items() if "tokens" not in k} for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in bare), encoding="utf-8")
    found = curve_of(artifact)
    validated = [point for point in found["points"] if "validation_nll" in point]
    for name in ("read", "written", "flops"):
        assert [point[name] for point in validated] == pytest.approx([share * found["spent"][name] for share in (0, 0.5, 1)])


def test_rows_that_a_teacher_wrote_are_paid_for_when_they_are_first_read(root: Path, tmp_path: Path) -> None:
    open_ended = {"finished": False, "repetition": False}
    writer = {"name": "written", "kind": "generate", "model": f"path:{root}/teacher", "filters": open_ended}
    writer["sampling"] = {"temperature": 1, "max_new_tokens": NEW}
    told = {
        name: stages(root, kind="sft", optim=OPTIM | {"epochs": epochs}) | {"name": name, "data": "stage:written"}
        for name, epochs in (("half", 0.5), ("twice", 2.0))
    }
    plain = stages(root, kind="sft", optim=OPTIM | {"epochs": 2.0}) | {"name": "plain"}
    done = made(root, tmp_path, writer, *told.values(), plain)
    half, twice, control = (curve_of(done[name]) for name in ("half", "twice", "plain"))
    assert twice["spent"]["written"] == done["written"].summary["response_tokens"]
    assert half["spent"]["written"] == pytest.approx(twice["spent"]["written"] / 2, rel=0.02)
    assert control["spent"]["written"] == 0
    for one, summary in ((half, done["half"].summary), (twice, done["twice"].summary)):
        assert one["spent"]["read"] == summary["tokens"]
    per_token = control["spent"]["flops"] / done["plain"].summary["tokens"]
    bought = twice["spent"]["flops"] - per_token * done["twice"].summary["tokens"]
    with FlopCounterMode(display=False) as counter:  # the teacher reads every answer once more, to score it
        made(root, tmp_path / "again", writer)
    assert bought == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_models_that_began_alike_are_known_by_it(root: Path, tmp_path: Path) -> None:
    quick = {"optim": OPTIM | {"steps": 2}, "validation": {"times": 1, "rows": 4, "max_new_tokens": 4}}
    first = stages(root, kind="sft", **quick)
    arms = {
        "a": first,
        "b": stages(root, kind="distill", **quick),
        "other rows": first | {"validation": {"times": 1, "rows": 6, "max_new_tokens": 4}},
        "another start": first | {"model": "stage:a"},
        "cut": first | {"init": {"kind": "layers", "count": 1}},
    }
    named = [table | {"name": name.replace(" ", "-")} for name, table in arms.items()]
    began = [curve_of(artifact)["began"] for artifact in made(root, tmp_path, *named).values()]
    assert began[0] == began[1]
    assert len(set(began)) == 4
