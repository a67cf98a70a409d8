"""Students that start as part of another model, that train adapters only, and teachers in eight bits."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_parts import chat_tokenizer, gpt2_tokenizer, rows, tiny_model, write_rows
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from potstill.commands.plan import estimate
from potstill.core.artifact import Artifact, file_hash
from potstill.core.errors import Interrupted, RecipeError, UserError
from potstill.core.types import Example
from potstill.data.batches import rows_of, step_batches
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, TokenStore, instruction_pairs
from potstill.edges.adapters import add_lora
from potstill.edges.models import load_model, save_model
from potstill.losses.cross_entropy import CrossEntropy
from potstill.recipe.parse import parse_recipe
from potstill.run.runner import run_recipe
from potstill.stages.base import Context
from potstill.stages.start import Adapter
from potstill.study.controls import trained_apart
from potstill.study.records import Study
from potstill.teachers.teacher import load_teacher
from potstill.train.loop import Optim, optimizer_for
from potstill.train.work import CheckpointRules, Work

FAMILIES = ("qwen2", "llama", "gpt2")
IDS_BT = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(0))
OPTIM = {"steps": 6, "batch_size": 8, "lr": 3e-3}
SHAPE = {"hidden_size": 32, "layers": 3, "intermediate_size": 64, "positions": 256}
LORA: dict[str, Any] = {"r": 4, "alpha": 8.0, "dropout": 0.0, "targets": ("all-linear",), "seed": 0}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS_BT.to(model.device)).logits


# adapters


def trained(model: Any, steps: int = 8, lr: float = 1e-2) -> list[float]:
    """Losses of a few steps on one batch."""
    model.train()
    optimizer, losses = optimizer_for(model, Optim(lr=lr)), []
    for _ in range(steps):
        loss = model(IDS_BT, labels=IDS_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapted_model_starts_as_it_was_learns_and_merges_into_a_plain_one(family: str) -> None:
    model = tiny_model(family, 300)
    kind, names, before = type(model), list(model.state_dict()), {n: t.clone() for n, t in model.state_dict().items()}
    first = logits(model)
    merge = add_lora(model, **LORA)
    assert type(model) is kind
    assert torch.equal(logits(model), first), "B is 0"
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning
    assert all(".lora_A." in name or ".lora_B." in name for name in learning)
    assert not any("lm_head" in name or "embed" in name or "wte" in name for name in learning)
    losses = trained(model)
    assert losses[-1] < losses[0] - 0.05
    for name, value in model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")]), "what is frozen stays"
    adapted = logits(model)
    assert not torch.allclose(adapted, first, atol=1e-2)
    merge()
    assert list(model.state_dict()) == names
    assert not any("lora" in type(module).__module__ for module in model.modules())
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all(name.endswith((".weight", ".bias")) for name in changed)
    assert not any("ln_" in name or "norm" in name or name.startswith("lm_head") for name in changed)


def test_a_merged_update_is_the_product_by_hand() -> None:
    model = tiny_model("qwen2", 300)
    was = model.base_model.layers[0].self_attn.q_proj.weight.detach().clone()
    merge = add_lora(model, **LORA | {"targets": ("q_proj",)})
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (4 * 32 + 32 * 4)
    trained(model, 2)
    layer = model.base_model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    merge()
    torch.testing.assert_close(model.base_model.layers[0].self_attn.q_proj.weight.detach(), was + 8.0 / 4 * b @ a)


def test_the_seed_alone_decides_where_adapters_start() -> None:
    def adapters(seed: int, drawn: int) -> list[Tensor]:
        model = tiny_model("qwen2", 300)
        torch.randn(drawn)
        add_lora(model, **LORA | {"seed": seed})
        return [p for p in model.parameters() if p.requires_grad]

    assert all(torch.equal(a, b) for a, b in zip(adapters(1, 5), adapters(1, 9), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(adapters(1, 5), adapters(2, 5), strict=True))


def test_a_rank_as_large_as_the_matrix_learns_about_as_fast_as_the_matrix() -> None:
    full, low = tiny_model("llama", 300), tiny_model("llama", 300)
    for name, parameter in full.named_parameters():
        parameter.requires_grad_("proj" in name)
    add_lora(low, **LORA | {"r": 32, "alpha": 32.0})
    whole, part = trained(full, 12), trained(low, 12)
    assert whole[0] == part[0]
    assert part[0] - part[-1] > 0.5 * (whole[0] - whole[-1])


class Made(TorchDispatchMode):
    """Shapes of all tensors made while it watches."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "view" not in str(func) and func not in (torch.ops.aten.detach.default, torch.ops.aten.t.default):
            self.shapes |= {tuple(t.shape) for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)}
        return out


@pytest.mark.parametrize("adapted", [True, False])
def test_a_frozen_head_costs_no_gradient(adapted: bool, tmp_path: Path) -> None:
    """The fused head makes V×D of gradient for a head that trains, and none for one that does not."""
    model = tiny_model("qwen2", 300)
    if adapted:
        add_lora(model, **LORA)
    else:
        model.requires_grad_(True)
    examples = [Example(str(i), row["instruction"], row["response"]) for i, row in enumerate(rows(8))]
    pairs = instruction_pairs(examples, Renderer(gpt2_tokenizer(300), Prompts(format="alpaca")), Counts())
    store = TokenStore.write(tmp_path / "store", pairs, Counts(), "here")
    (batch,) = step_batches(rows_of(store, [0, 1]), 8192)
    with Made() as made:
        CrossEntropy()(model, batch).total.backward()
    assert ((300, 32) in made.shapes) != adapted
    assert (model.get_output_embeddings().weight.grad is None) == adapted


def test_targets_are_layers_of_the_body() -> None:
    for target, told in (("lm_head", ""), ("q_porj", "; did you mean 'q_proj'?"), ("embed_tokens", "")):
        with pytest.raises(UserError) as caught:
            add_lora(tiny_model("qwen2", 300), **LORA | {"targets": (target,)})
        assert str(caught.value) == (
            f"adapter.targets: the model has no linear layer '{target}'{told} "
            "(known: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj)"
        )


def test_one_target_needs_no_brackets() -> None:
    assert Adapter.model_validate({"targets": "q_proj"}).targets == ("q_proj",)
    assert Adapter.model_validate(Adapter().model_dump(mode="json")) == Adapter()


# stages


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: Any) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def recipe(path: Path, *stages: dict[str, Any], base: str | None = None) -> dict[str, Any]:
    tuned = {"optim": OPTIM, "validation": {"times": 0}}
    data = {"kind": "jsonl", "path": str(path), "context": "context", "splits": {"validation": 0.1, "test": 0.2}}
    teacher = {"name": "teacher", "kind": "sft", "model": base or "stage:base", **tuned}
    begun = {"name": "base", "kind": "pretrain", "shape": SHAPE, "vocab_size": 320, "optim": OPTIM}
    return {
        "name": "students",
        "data": data,
        "prompts": {"max_tokens": 160, "max_prompt_tokens": 120},
        "stage": [*([begun] if base is None else []), teacher, *({**tuned, **stage} for stage in stages)],
    }


def run(table: dict[str, Any], out: Path) -> dict[str, Artifact]:
    return run_recipe(parse_recipe(table), out)


CUT = {"kind": "layers", "keep": [0, 2]}
KD = {"name": "kd", "kind": "distill", "student": "stage:teacher", "teacher": "stage:teacher"}
SFT = {"name": "sft", "kind": "sft", "model": "stage:teacher"}


def study(*names: str) -> dict[str, Any]:
    models = [{"name": n, "role": r, "model": f"stage:{n}"} for n, r in zip(names, ("kd", "sft", "teacher"), strict=False)]
    return {"name": "study", "kind": "evaluate", "study": models, "decoding": {"max_new_tokens": 3}}


@pytest.fixture(scope="module")
def done(rows_file: Path, tmp_path_factory: Any) -> dict[str, Artifact]:
    """A teacher, distilled into part of itself; the control from the same part; one with adapters; one of half its width."""
    adapter = {"r": 2, "targets": ["q_proj", "down_proj"]}
    table = recipe(
        rows_file,
        {**KD, "init": CUT, "teacher_precision": "int8"},
        {**SFT, "init": CUT},
        {**KD, "name": "lora", "init": CUT, "adapter": adapter},
        {**SFT, "name": "narrow", "init": {"kind": "width", "hidden_size": 16, "heads": 2, "intermediate_size": 24}},
    )
    quantized = {"name": "kd4", "kind": "quantize", "model": "stage:lora", "rows": 4}
    table["stage"] += [quantized, study("kd", "sft", "teacher"), {"name": "export", "kind": "export", "model": "stage:kd4"}]
    table["stage"] += [{**study("lora", "narrow", "teacher"), "name": "apart"}]
    table["stage"] += [{"name": "report", "kind": "report", "study": "stage:apart"}]
    return run(table, tmp_path_factory.mktemp("students"))


def test_a_teacher_is_distilled_into_part_of_itself(done: dict[str, Artifact]) -> None:
    kd, sft, teacher = (load_model(f"path:{done[name].folder}") for name in ("kd", "sft", "teacher"))
    assert kd.config.num_hidden_layers == sft.config.num_hidden_layers == 2
    assert teacher.config.num_hidden_layers == 3
    assert done["kd"].summary["parameters"] == done["sft"].summary["parameters"] < done["teacher"].summary["parameters"]
    narrow = load_model(f"path:{done['narrow'].folder}")
    assert (narrow.config.hidden_size, narrow.config.intermediate_size, narrow.config.num_attention_heads) == (16, 24, 2)


def test_student_and_control_start_alike_and_the_study_knows(done: dict[str, Artifact]) -> None:
    rows = {row.name: row for row in Study.load(done["study"].folder).rows}
    assert trained_apart(rows["kd"], rows["sft"]) == {}
    assert [one.init for one in rows["kd"].trained or ()] == ["(kind layers, keep [0, 2])"]
    assert [(one.init, one.adapter) for one in rows["teacher"].trained or ()] == [("none", "none")]


def test_a_control_with_another_start_is_told(done: dict[str, Artifact]) -> None:
    report = json.loads((done["report"].folder / "report.json").read_text())
    told = " ".join(report["caveats"])
    width = "kind width, hidden_size 16, intermediate_size 24, heads 2, by activation, rows 32"
    assert f"init ({width}) against (kind layers, keep [0, 2])" in told
    assert "adapter none against (r 2, alpha 16.0, dropout 0.0, targets ['q_proj', 'down_proj'])" in told
    assert "how that model was cut and which of its weights trained" in json.dumps(report["headline"])


def test_an_adapted_student_leaves_a_plain_model(done: dict[str, Artifact]) -> None:
    from safetensors import safe_open

    summary = done["lora"].summary
    assert summary["trained_parameters"] == 2 * (2 * (32 + 32) + 2 * (64 + 32)) < summary["parameters"]
    assert done["kd"].summary["trained_parameters"] == done["kd"].summary["parameters"]
    assert summary["parameters"] == done["kd"].summary["parameters"]
    with (
        safe_open(done["lora"].folder / "model.safetensors", "pt") as lora,
        safe_open(done["kd"].folder / "model.safetensors", "pt") as plain,
    ):
        assert set(lora.keys()) == set(plain.keys())
    assert not list(done["lora"].folder.glob("adapter*"))
    from safetensors.torch import load_file

    begun, ended = (load_file(done[name].folder / "model.safetensors") for name in ("teacher", "lora"))
    place = {"model.layers.0": "model.layers.0", "model.layers.1": "model.layers.2"}
    same = {n: torch.equal(t, begun[place.get(n[:14], n[:14]) + n[14:]]) for n, t in ended.items()}
    assert {name.split(".")[-2] for name, equal in same.items() if not equal} == {"q_proj", "down_proj"}
    assert done["kd4"].summary["kept"] == []
    assert (done["export"].folder / "model-q4_0.gguf").is_file()


def test_a_plan_knows_the_cut_model(done: dict[str, Artifact], rows_file: Path, tmp_path: Path) -> None:
    table = recipe(rows_file, {**KD, "init": CUT}, {**KD, "name": "lora", "init": CUT, "adapter": {}})
    planned = {line.stage: line.json() for line in estimate(parse_recipe(table), tmp_path / "run", measure=False).lines}
    assert planned["kd"]["parameters"] == done["kd"].summary["parameters"]
    assert planned["lora"]["memory_bytes"] < planned["kd"]["memory_bytes"]


def test_adapters_and_an_eight_bit_teacher_train_in_bf16(rows_file: Path, tmp_path: Path) -> None:
    base, optim = saved(tmp_path / "base"), OPTIM | {"steps": 12, "lr": 1e-2, "precision": "bf16"}
    kd = {**KD, "student": base, "adapter": {}, "teacher_precision": "int8", "optim": optim}
    ran = run(recipe(rows_file, kd, base=base), tmp_path / "out")["kd"]
    losses = [json.loads(line)["loss"] for line in (ran.folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert {p.dtype for p in load_model(f"path:{ran.folder}").parameters()} == {torch.float32}


# preflight


def saved(folder: Path, layers: int = 2) -> str:
    tokenizer = chat_tokenizer(320)
    save_model(tiny_model("qwen2", len(tokenizer), eos=tokenizer.eos_token_id, num_hidden_layers=layers), tokenizer, folder)
    return f"path:{folder}"


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        ([], "needs at least 1"),
        ([-1, 0], "must be layers counted from 0, each after the one before it, such as [0, 2, 4]"),
        ([0, 0], "must be layers counted from 0, each after the one before it, such as [0, 2, 4]"),
        ([2, 0], "must be layers counted from 0, each after the one before it, such as [0, 2, 4]"),
    ],
)
def test_layers_that_make_no_sense_are_refused_when_the_recipe_is_read(keep: list[int], told: str, rows_file: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(recipe(rows_file, {**SFT, "init": {"kind": "layers", "keep": keep}}))
    assert f"sft.init.keep = {keep}  {told}" in str(caught.value)


def test_a_layer_too_far_is_refused_before_anything_runs(rows_file: Path, tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    kd = {**KD, "student": base, "init": {"kind": "layers", "keep": [0, 5]}}
    with pytest.raises(UserError) as caught:
        run(recipe(rows_file, kd, base=base), tmp_path / "out")
    assert "kd.init.keep = [0, 5]  the model has 2 layers, 0 to 1; name some of these" in str(caught.value)
    assert not list((tmp_path / "out" / "artifacts").iterdir())


def test_a_layer_too_far_in_what_a_stage_made_is_refused_when_it_is_there(rows_file: Path, tmp_path: Path) -> None:
    kd = {**KD, "init": {"kind": "layers", "keep": [0, 5]}}
    with pytest.raises(UserError, match=r"kd\.init\.keep = \[0, 5\]  the model has 2 layers"):
        run(recipe(rows_file, kd, base=saved(tmp_path / "base")), tmp_path / "out")


def test_missing_peft_is_told_before_anything_runs(rows_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError) as caught:
        run(recipe(rows_file, {**SFT, "adapter": {}}, base=saved(tmp_path / "base")), tmp_path / "out")
    assert "sft.adapter  needs the peft library; pip install 'potstill[lora]'" in str(caught.value)
    assert not list((tmp_path / "out" / "artifacts").iterdir())


# interruption


class Stopping:
    """Asks for a stop at every third step."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> bool:
        self.calls += 1
        return self.calls == 3


@pytest.mark.parametrize("kind", ["sft", "distill"])
@pytest.mark.parametrize("init", [None, CUT | {"keep": [1]}])
def test_stopped_at_every_third_step_it_ends_the_same(kind: str, init: Any, rows_file: Path, tmp_path: Path) -> None:
    base, adapter = saved(tmp_path / "base"), {"r": 3, "dropout": 0.2}
    stage = {**(KD | {"student": base, "teacher": base} if kind == "distill" else SFT | {"model": base}), "init": init}
    stage |= {"adapter": adapter, "optim": OPTIM | {"steps": 10, "batch_size": 4}}
    stage |= {"validation": {"times": 2, "rows": 2, "max_new_tokens": 2}}
    parsed = parse_recipe(recipe(rows_file, stage, base=base)).stages[-1]
    ran = parsed.run(Context(Work(tmp_path / "straight", "straight")))
    stops = 0
    while True:
        torch.manual_seed(stops + 100)
        work = Work(tmp_path / "broken", "broken", checkpoint=CheckpointRules(every_steps=4), stop_requested=Stopping())
        try:
            again = parsed.run(Context(work))
            break
        except Interrupted:
            stops += 1
            newest = sorted((tmp_path / "broken" / "checkpoints").iterdir())[-1]
            assert_only_adapters(newest / "state.safetensors")
    assert stops == 3
    for name in ("model.safetensors", "metrics.jsonl"):
        assert file_hash(tmp_path / "broken" / name) == file_hash(tmp_path / "straight" / name)
    of_the_process = ("training_seconds", "signal")  # how much was read back and how much computed
    timeless = [{k: v for k, v in found.items() if k not in of_the_process} for found in (ran, again)]
    assert timeless[0] == timeless[1]


def assert_only_adapters(file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as state:
        assert all(".lora_" in name for name in state.keys() if not name.startswith("random."))  # noqa: SIM118


# teachers


@pytest.mark.parametrize(
    ("precision", "bf16", "dtype"),
    [
        ("auto", False, torch.float32),
        ("auto", True, torch.bfloat16),
        ("fp32", True, torch.float32),
        ("bf16", False, torch.bfloat16),
        ("int8", False, torch.float32),
        ("int8", True, torch.bfloat16),
    ],
)
def test_a_teacher_is_held_as_asked(precision: Any, bf16: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    from potstill.quant.int8 import Int8Linear

    model = load_teacher(saved(tmp_path / "base"), precision, bf16)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert any(isinstance(layer, Int8Linear) for layer in model.modules()) == (precision == "int8")
    assert type(model.get_output_embeddings()) is nn.Linear


def test_a_trained_teacher_in_eight_bits_says_nearly_the_same(done: dict[str, Artifact]) -> None:
    where = f"path:{done['teacher'].folder}"
    p, q = (F.log_softmax(logits(load_teacher(where, precision, False)).double(), -1) for precision in ("fp32", "int8"))
    assert 0 < float((p.exp() * (p - q)).sum(-1).mean()) < 1e-3
