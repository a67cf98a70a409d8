"""The student's layers learn the teacher's: the sum that is written, whatever the packing, and no other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_parts import chat_tokenizer, tiny_model, write_rows
from torch import Tensor

from potstill.commands.plan import estimate
from potstill.core.errors import RecipeError
from potstill.data.batches import pack
from potstill.divergences.forward_kl import ForwardKL
from potstill.edges import packed
from potstill.edges.models import blocks_of, save_model
from potstill.losses.distillation import Distillation
from potstill.losses.hidden_states import HiddenStates, layers_to_learn
from potstill.recipe.parse import parse_recipe
from potstill.run.runner import run_recipe
from potstill.teachers.signals import Live

VOCAB = 64
ROWS = [([1, 2, 3], [4, 5]), ([6, 7], [8]), ([9, 10, 11, 12], [13, 14, 15]), ([16, 17], [18, 19, 20])]


def model(layers: int, seed: int, family: str = "qwen2") -> Any:
    return tiny_model(family, VOCAB, seed=seed, num_hidden_layers=layers).double()


def objective(teacher: Any, layers: tuple[int, ...], weight: float) -> HiddenStates:
    teacher.requires_grad_(False)
    return HiddenStates(Distillation(Live(teacher), ForwardKL(), 0.5, 1.0, VOCAB), teacher, layers, weight)


def states(one: Any, ids: list[int]) -> list[Tensor]:
    """What each layer gives for one row, by a pass of transformers' own."""
    found: list[Tensor] = []

    def hear(_: Any, __: Any, output: Any) -> None:
        found.append((output if torch.is_tensor(output) else output[0])[0])

    handles = [block.register_forward_hook(hear) for block in blocks_of(one)]
    one(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 2.5, 1.0]])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_it_adds_the_mean_distance_of_each_row_as_often_as_it_has_response_tokens(
    family: str, weights: list[float] | None
) -> None:
    shape = {"n_layer": 2} if family == "gpt2" else {"num_hidden_layers": 2}
    student = tiny_model(family, VOCAB, seed=1, **shape).double()
    shape = {"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4}
    teacher = tiny_model(family, VOCAB, seed=2, **shape).double()
    layers = (0, 3)
    learns = objective(teacher, layers, 0.7)
    batch = pack(ROWS, weights)
    got = learns(student, batch)
    logits = learns.objective(student, batch).total
    distance = torch.zeros((), dtype=torch.float64)
    for (prompt, response), weight in zip(ROWS, weights or [1.0] * 4, strict=True):
        ours, theirs = states(student, prompt + response), [each.detach() for each in states(teacher, prompt + response)]
        for i, layer in enumerate(layers):
            relative_T = (ours[i] - theirs[layer]).square().sum(-1) / theirs[layer].square().sum(-1)
            distance = distance + weight * len(response) * relative_T.mean() / len(layers)
    assert float(got.parts["hidden_states"]) == pytest.approx(distance.item(), rel=1e-9)
    assert got.total.item() == pytest.approx((logits + 0.7 * distance).item(), rel=1e-9)
    parameters = [p for p in student.parameters() if p.requires_grad]
    both, of_logits, of_distance = (
        torch.autograd.grad(part, parameters, allow_unused=True, materialize_grads=True)
        for part in (got.total, logits, distance)
    )
    for found, one, other in zip(both, of_logits, of_distance, strict=True):
        assert torch.allclose(found, one + 0.7 * other, rtol=1e-5, atol=1e-6), "rotations are in float32"


def test_the_sum_of_two_halves_is_the_whole() -> None:
    student, learns = model(2, 1), objective(model(4, 2), (1, 3), 2.0)
    whole = learns(student, pack(ROWS)).total
    halves = learns(student, pack(ROWS[:1])).total + learns(student, pack(ROWS[1:])).total
    assert whole.item() == pytest.approx(halves.item(), rel=1e-9)


@pytest.mark.parametrize("whole", ["neither", "teacher", "student", "both"])
def test_a_prompt_that_rows_share_counts_for_each_of_them(whole: str) -> None:
    """Also where one of the two models reads every row whole, as those with recurrent layers do."""
    student, teacher = model(2, 1), model(4, 2)
    for name, one in (("student", student), ("teacher", teacher)):
        packed._WAYS[one] = whole not in (name, "both")
    learns, weights = objective(teacher, (1, 3), 2.0), [1.0, 0.5, 2.5, 3.0, 1.0, 1.0]
    group = [(ROWS[0][0], [4, 5]), (ROWS[1][0], [8]), (ROWS[0][0], [7, 7, 9]), (ROWS[0][0], []), (ROWS[1][0], [3]), ROWS[2]]
    found = []
    for prompts in (None, [repr(prompt).encode() for prompt, _ in group]):
        batch = pack(group, weights, prompts)
        assert (batch.shared is None) is (prompts is None)
        loss = learns(student, batch)
        found.append((loss, torch.autograd.grad(loss.total, list(student.parameters()))))
    (apart, of_apart), (once, of_once) = found
    assert float(once.parts["hidden_states"]) == pytest.approx(float(apart.parts["hidden_states"]), rel=1e-12)
    assert once.total.item() == pytest.approx(apart.total.item(), rel=1e-12)
    for a, b in zip(of_apart, of_once, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-6)  # norms are in float32


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    learns = objective(model(2, 3), (0, 1), 1.0)
    assert float(learns(model(2, 3), pack(ROWS)).parts["hidden_states"]) < 1e-20


@pytest.mark.parametrize(
    "student, teacher, keep, layers",
    [
        (3, 6, None, (1, 3, 5)),
        (3, 4, None, (1, 2, 3)),
        (2, 2, None, (0, 1)),
        (3, 6, [0, 2, 5], (1, 4, 5)),
        (4, 6, [0, 1, 2, 3], (0, 1, 2, 5)),
        (2, 6, [0, 2, 5], (2, 5)),
        (2, 3, [0, 5], (1, 2)),
    ],
)
def test_layers_that_went_are_learned_by_those_before_them(
    student: int, teacher: int, keep: list[int] | None, layers: tuple[int, ...]
) -> None:
    """Of another cut than the student's, `keep` says nothing: then the layers are spread evenly."""
    assert layers_to_learn(student, teacher, keep) == layers


def recipe(folder: Path, **fields: Any) -> Any:
    chat = chat_tokenizer()
    save_model(tiny_model("qwen2", len(chat), num_hidden_layers=4), chat, folder / "model")
    save_model(tiny_model("qwen2", len(chat), width=64), chat, folder / "wide")
    teacher = f"path:{folder / 'model'}"
    cut = {"name": "cut", "kind": "cut", "model": teacher, "init": {"kind": "layers", "count": 2, "rows": 4}}
    kd = {"name": "kd", "kind": "distill", "student": "stage:cut", "teacher": teacher, "hidden_states": {"weight": 5.0}}
    train = {"optim": {"steps": 12, "batch_size": 8, "lr": 3e-3}, "validation": {"times": 0}}
    data = {"kind": "jsonl", "path": str(write_rows(folder / "rows.jsonl")), "context": "context"}
    prompts = {"max_tokens": 128, "max_prompt_tokens": 96}
    stages = [cut, {**kd, **train, **fields}]
    return parse_recipe({"name": "hidden", "seeds": [1], "data": data, "prompts": prompts, "stage": stages})


def test_a_student_comes_nearer_to_the_layers_it_was_cut_from(tmp_path: Path) -> None:
    asked = recipe(tmp_path)
    plan = {line.json()["stage"]: line.json() for line in estimate(asked, tmp_path / "run", measure=True).lines}
    assert plan["kd"]["seconds"] > 0
    made = run_recipe(asked, tmp_path / "run")
    keep = made["cut"].summary["cut"]["keep"]
    assert made["kd"].summary["hidden_states"] == {"layers": [keep[1] - 1, 3]}
    assert made["kd"].summary["signal"]["kept"] == "live"
    lines = (made["kd"].folder / "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [step for step in map(json.loads, lines) if "hidden_states" in step]
    assert steps[-1]["hidden_states"] < 0.9 * steps[0]["hidden_states"]


@pytest.mark.parametrize(
    "fields, rule",
    [
        ({"signal": "topk"}, "hidden_states needs the teacher beside the student; leave out signal and cache"),
        ({"adapter": {"r": 2}}, "hidden_states changes whole layers; leave out adapter"),
        ({"teacher": "wide"}, "the student's states are 32 wide and the teacher's 64; cut the student by layers"),
        ({"hidden_states": {"layers": [0]}}, r"layers = \[0\]: needs 2 of the teacher's layers, each from 0 to 3"),
        ({"hidden_states": {"layers": [0, 4]}}, r"layers = \[0, 4\]: needs 2 of the teacher's layers, each from 0 to 3"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_the_first_step(fields: dict[str, Any], rule: str, tmp_path: Path) -> None:
    if "teacher" in fields:
        fields = {"teacher": f"path:{tmp_path / fields['teacher']}"}
    with pytest.raises(RecipeError, match=rule):
        run_recipe(recipe(tmp_path, **fields), tmp_path / "run")


@pytest.mark.parametrize(
    "stages, layers",
    [
        ([("cut", {"keep": [0, 1, 5]})], [0, 4, 5]),
        ([("cut", {"keep": [0, 3, 4]}), ("sft", None)], [2, 3, 5]),
        ([("cut", {"keep": [0, 1, 3, 4]}), ("own", {"keep": [0, 2, 3]})], [2, 3, 5]),
        ([("own", {"keep": [0, 3]})], [2, 5]),
    ],
    ids=["cut", "tuned between", "cut twice", "cut as it starts"],
)
def test_however_a_student_was_cut_its_layers_learn_those_it_lost(
    stages: list[tuple[str, dict[str, Any] | None]], layers: list[int], tmp_path: Path
) -> None:
    chat = chat_tokenizer()
    save_model(tiny_model("qwen2", len(chat), num_hidden_layers=6), chat, tmp_path / "model")
    teacher = student = f"path:{tmp_path / 'model'}"
    train: dict[str, Any] = {"optim": {"steps": 1, "batch_size": 4}, "validation": {"times": 0}}
    tables: list[dict[str, Any]] = []
    for kind, init in stages:
        cut = {"init": {"kind": "layers", **init}} if init else {}
        if kind == "own":
            train |= cut
            continue
        tables.append({"name": kind, "kind": kind, "model": student, **cut, **(train if kind == "sft" else {})})
        student = f"stage:{kind}"
    tables.append({"name": "kd", "kind": "distill", "student": student, "teacher": teacher, "hidden_states": {}, **train})
    data = {"kind": "jsonl", "path": str(write_rows(tmp_path / "rows.jsonl")), "context": "context"}
    prompts = {"max_tokens": 128, "max_prompt_tokens": 96}
    made = run_recipe(
        parse_recipe({"name": "hidden", "seeds": [1], "data": data, "prompts": prompts, "stage": tables}), tmp_path / "run"
    )
    assert made["kd"].summary["hidden_states"] == {"layers": layers}
