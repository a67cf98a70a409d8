"""Killed anywhere and run again, a recipe ends with the same bytes as if nothing had happened."""

import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_parts import gpt2_tokenizer, rows, tiny_model, write_rows

from potstill.core.artifact import file_hash
from potstill.core.errors import Interrupted, UserError
from potstill.core.types import Example
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, TokenStore, instruction_pairs
from potstill.edges.models import save_model
from potstill.losses.cross_entropy import CrossEntropy
from potstill.recipe.parse import parse_recipe
from potstill.run.runner import run_recipe
from potstill.run.stopper import Stopper
from potstill.train.loop import Optim, fit
from potstill.train.work import CheckpointRules, Work

STEPS = 24
CHILDREN = multiprocessing.get_context("forkserver")  # each is forked of one that has imported all that a run needs
MODELS = [f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "qwen2")]
CHILDREN.set_forkserver_preload(["torch", "potstill.cli", "potstill.stages", "potstill.run.runner", *MODELS])

RECIPE = """
name = "killed"
data = {{ kind = "jsonl", path = "{rows}", context = "context", splits = {{ validation = 0.1, test = 0.1 }} }}
prompts = {{ format = "alpaca", max_tokens = 256, max_prompt_tokens = 200 }}
checkpoint = {{ every_steps = 3 }}

[[stage]]
name = "base"
kind = "pretrain"
tokenizer = "path:{student}"
shape = {{ hidden_size = 32, layers = 2, intermediate_size = 64, positions = 256 }}
optim = {{ steps = {steps}, batch_size = 4 }}

[[stage]]
name = "teacher"
kind = "sft"
model = "stage:base"
optim = {{ steps = {steps}, batch_size = 4 }}
validation = {{ times = 2, rows = 2, max_new_tokens = 2 }}

[[stage]]
name = "kd"
kind = "distill"
student = "path:{student}"
teacher = "stage:teacher"
samples = {{ share = 0.5, every = 2, max_new_tokens = 4, max_gap = 100 }}
optim = {{ steps = {steps}, batch_size = 4 }}
validation = {{ times = 3, rows = 2, max_new_tokens = 2 }}
"""


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: Any) -> Path:
    """A Qwen2 teacher and a GPT-2 student whose dropout makes every step draw random numbers."""
    root = tmp_path_factory.mktemp("killed")
    tokenizer = gpt2_tokenizer(300)
    student = tiny_model("gpt2", len(tokenizer), attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1)
    save_model(student, tokenizer, root / "student")
    write_rows(root / "rows.jsonl")
    file = root / "killed.toml"
    file.write_text(RECIPE.format(rows=root / "rows.jsonl", student=root / "student", steps=STEPS))
    return file


def parsed(file: Path) -> Any:
    from potstill.recipe.parse import load_recipe

    return load_recipe(file)


def results(out: Path) -> dict[str, Any]:
    """Hashes of the weights and the figures, by stage."""
    found = {}
    for folder in sorted((out / "artifacts").glob("[!.]*")):
        name = folder.name.rpartition("-")[0]
        found[name] = file_hash(folder / "model.safetensors"), (folder / "metrics.jsonl").read_text()
    return found


def all_artifacts_are_whole(out: Path) -> bool:
    return all((folder / "artifact.json").is_file() for folder in (out / "artifacts").glob("[!.]*"))


def logged(out: Path, stage: str) -> int:
    files = list((out / "artifacts").glob(f".work-{stage}-*/metrics.jsonl"))
    try:
        return files[0].read_bytes().count(b"\n") if files else 0
    except FileNotFoundError:  # renamed while we looked
        return 0


def potstill(*words: str) -> None:
    """The command line, in a process of its own."""
    from potstill.cli import main

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    sys.argv = ["potstill", *words]
    main()


def stop_at(recipe_file: Path, out: Path, stage: str, line: int, how: signal.Signals) -> int:
    """Run the recipe and send a signal once the stage has logged that many lines; the exit status."""
    process = CHILDREN.Process(target=potstill, args=("run", str(recipe_file), "--out", str(out), "--quiet"))
    process.start()
    assert process.pid is not None
    deadline = time.monotonic() + 60
    while logged(out, stage) < line and process.is_alive() and time.monotonic() < deadline:
        assert all_artifacts_are_whole(out)
        time.sleep(0.001)
    os.kill(process.pid, how)
    process.join(60)
    assert all_artifacts_are_whole(out)
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(recipe_file: Path, tmp_path_factory: Any) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("whole")
    run_recipe(parsed(recipe_file), out)
    return results(out)


def test_killed_at_several_places_it_ends_the_same(recipe_file: Path, uninterrupted: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # before the first checkpoint, between two, after the first validation, and by Ctrl-C
    assert stop_at(recipe_file, out, "base", 2, signal.SIGKILL) == -signal.SIGKILL
    assert stop_at(recipe_file, out, "teacher", 11, signal.SIGKILL) == -signal.SIGKILL
    assert stop_at(recipe_file, out, "kd", 1, signal.SIGKILL) == -signal.SIGKILL
    assert stop_at(recipe_file, out, "kd", 9, signal.SIGINT) == 130
    (work,) = (out / "artifacts").glob(".work-kd-*")
    names = sorted(path.name for path in (work / "checkpoints").iterdir())
    assert len(names) == 2, "Ctrl-C saved, and only two are kept"
    run_recipe(parsed(recipe_file), out)
    assert results(out) == uninterrupted
    for name, (_, figures) in results(out).items():
        steps = [line["step"] for line in map(json.loads, figures.splitlines()) if "loss" in line]
        assert steps == list(range(1, STEPS + 1)), name
    checked = [line["step"] for line in map(json.loads, results(out)["kd"][1].splitlines()) if "validation_nll" in line]
    assert checked == [0, 8, 16, 24]
    assert not list((out / "artifacts").glob(".work-*"))


class Stopping:
    """Asks for a stop, or dies, at one step of a stage that runs in this process."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self) -> bool:
        self.calls += 1
        return self.calls == self.at


@pytest.fixture(scope="module")
def store(tmp_path_factory: Any) -> TokenStore:
    examples = [Example(str(i), row["instruction"], row["response"]) for i, row in enumerate(rows(30))]
    pairs = instruction_pairs(examples, Renderer(gpt2_tokenizer(300), Prompts(format="alpaca")), Counts())
    return TokenStore.write(tmp_path_factory.mktemp("store"), pairs, Counts(), "here")


def student(family: str = "gpt2", **more: Any) -> Any:
    dropout = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1} if family == "gpt2" else {"attention_dropout": 0.1}
    return tiny_model(family, 300, **(dropout | more))


def weights(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def ends_the_same(store: TokenStore, family: str, folder: Path, spoil: Any = None, **optim: Any) -> bool:
    """Interrupted at every third step, against straight through; `spoil` damages what lies on disk between."""
    settings = Optim(**({"steps": 10, "batch_size": 4, "lr": 1e-3} | optim))
    straight = student(family)
    figures = fit(straight, store, CrossEntropy(), settings, Work(folder / "straight", "straight"), seed=1)
    while True:
        model = student(family, seed=99)  # other weights: all must come from the checkpoint
        if not (folder / "broken" / "checkpoints").exists():
            model = student(family)
        work = Work(folder / "broken", "broken", checkpoint=CheckpointRules(every_steps=4), stop_requested=Stopping(3))
        torch.manual_seed(time.monotonic_ns())
        try:
            again = fit(model, store, CrossEntropy(), settings, work, seed=1)
            break
        except Interrupted:
            if spoil is not None:
                spoil(work.folder / "checkpoints")
    same = all(torch.equal(a, b) for a, b in zip(weights(straight), weights(model), strict=True))
    logs = [(folder / name / "metrics.jsonl").read_text() for name in ("straight", "broken")]
    timeless = [replace(f, training_seconds=0.0) for f in (figures, again)]
    return same and logs[0] == logs[1] and timeless[0] == timeless[1]


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama"])
def test_stopped_at_every_third_step_it_ends_the_same(store: TokenStore, family: str, tmp_path: Path) -> None:
    assert ends_the_same(store, family, tmp_path)


@pytest.mark.parametrize("at", [0, 4, 8])
def test_stopped_in_the_middle_of_a_validation_it_ends_the_same(store: TokenStore, at: int, tmp_path: Path) -> None:
    """The validation is measured when the stage goes on, once."""
    settings, seen = Optim(steps=8, batch_size=4, lr=1e-3), []

    def straight(model: Any) -> dict[str, float]:
        return {"validation_nll": sum(p.detach().double().sum().item() for p in model.parameters())}

    def stopping(model: Any) -> dict[str, float]:
        seen.append(len(seen))
        if len(seen) == 1 + at // 4:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return straight(model)

    model = student()
    fit(model, store, CrossEntropy(), settings, Work(tmp_path / "a", "a"), seed=1, validate=straight, validations=2)
    stopper = Stopper()
    work = Work(
        tmp_path / "b", "b", stop_requested=lambda: stopper.asked, hold=stopper.hold, interruptible=stopper.interruptible
    )
    with pytest.raises(Interrupted, match=f"^b: stopped at step {at} of 8; "), stopper.listening():
        fit(student(), store, CrossEntropy(), settings, work, seed=1, validate=stopping, validations=2)
    again = student(seed=99) if at else student()
    fit(again, store, CrossEntropy(), settings, Work(tmp_path / "b", "b"), seed=1, validate=straight, validations=2)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(again), strict=True))
    assert (tmp_path / "a/metrics.jsonl").read_text() == (tmp_path / "b/metrics.jsonl").read_text()


def test_resumed_where_less_memory_is_free_it_ends_the_same(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a vocabulary so large that a step's logits would be cut, were they cut by what is free."""
    settings = Optim(steps=3, batch_size=20, lr=1e-3)
    straight, model = (tiny_model("qwen2", 40_000, width=16) for _ in range(2))
    fit(straight, store, CrossEntropy(), settings, Work(tmp_path / "straight", "straight"), seed=1)
    broken = Work(tmp_path / "broken", "broken", checkpoint=CheckpointRules(every_steps=1), stop_requested=Stopping(2))
    with pytest.raises(Interrupted):
        fit(model, store, CrossEntropy(), settings, broken, seed=1)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 20, total=1 << 30))
    fit(model, store, CrossEntropy(), settings, Work(tmp_path / "broken", "broken"), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(model), strict=True))


def test_half_written_checkpoints_are_ignored(store: TokenStore, tmp_path: Path) -> None:
    def spoil(checkpoints: Path) -> None:
        aside = checkpoints / "step-000000999.tmp"
        aside.mkdir(exist_ok=True)
        (aside / "state.safetensors").write_bytes(b"\x08")

    assert ends_the_same(store, "gpt2", tmp_path, spoil)


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
def test_a_torn_checkpoint_gives_way_to_the_one_before(store: TokenStore, file: str, tmp_path: Path) -> None:
    torn = []

    def tear(checkpoints: Path) -> None:
        folders = sorted(checkpoints.iterdir())
        if len(folders) > 1 and not torn:
            torn.append(folders[-1])
            path = folders[-1] / file
            path.write_bytes(path.read_bytes()[:-7])

    assert ends_the_same(store, "gpt2", tmp_path, tear)
    assert torn


@pytest.mark.parametrize("lost", ["optim.", "random.", "model."])
def test_the_law_rejects_a_checkpoint_that_forgets(store: TokenStore, lost: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def forget(checkpoints: Path) -> None:
        file = sorted(checkpoints.iterdir())[-1] / "state.safetensors"
        tensors = load_file(file)
        kept = {name: t for name, t in tensors.items() if not name.startswith(lost)}
        if lost == "random.":
            kept["random.cpu"] = torch.Generator().manual_seed(77).get_state()
        if lost == "model.":
            kept |= {name: t * 1.01 for name, t in tensors.items() if name.startswith(lost)}
        save_file(kept, file)

    assert not ends_the_same(store, "gpt2", tmp_path, forget)


def test_two_checkpoints_are_kept_and_each_is_whole(store: TokenStore, tmp_path: Path) -> None:
    work = Work(tmp_path, "here", checkpoint=CheckpointRules(every_steps=2))
    fit(student(), store, CrossEntropy(), Optim(steps=9, batch_size=2), work, seed=0)
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-000000006", "step-000000008"]
    for folder in folders:
        assert sorted(path.name for path in folder.iterdir()) == ["state.json", "state.safetensors"]


def test_a_poisoned_weight_stops_the_run_with_the_last_checkpoint_kept(store: TokenStore, tmp_path: Path) -> None:
    class Poisoned(CrossEntropy):
        steps = 0

        def __call__(self, model: Any, batch: Any) -> Any:
            self.steps += 1
            if self.steps == 6:
                with torch.no_grad():
                    next(model.parameters())[:] = torch.nan
            return super().__call__(model, batch)

    work = Work(tmp_path, "teacher", checkpoint=CheckpointRules(every_steps=2))
    with pytest.raises(UserError) as caught:
        fit(student(), store, Poisoned(), Optim(steps=10, batch_size=5, lr=0.5), work, seed=0)
    text = str(caught.value)
    assert text.startswith("teacher: the loss is not finite at step 6 of 10 (epoch 1.00, lr 0.25, data rows [")
    assert text.endswith("the checkpoint of step 4 is kept; lower optim.lr, add optim.warmup, or look at those rows")
    kept = tmp_path / "checkpoints" / "step-000000004"
    from safetensors.torch import load_file

    assert all(t.isfinite().all() for name, t in load_file(kept / "state.safetensors").items() if "random" not in name)
    assert work.metrics.read()[-1]["step"] == 5


def test_a_diverging_stage_leaves_no_artifact(recipe_file: Path, tmp_path: Path) -> None:
    tokenizer, folder = gpt2_tokenizer(300), tmp_path / "spoilt"
    model = tiny_model("gpt2", len(tokenizer))
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan
    save_model(model, tokenizer, folder)
    table = {
        "name": "diverging",
        "data": {"kind": "jsonl", "path": str(recipe_file.parent / "rows.jsonl")},
        "prompts": {"format": "alpaca", "max_tokens": 256, "max_prompt_tokens": 200},
        "stage": [{"name": "sft", "kind": "sft", "model": f"path:{folder}", "validation": {"times": 0}}],
    }
    with pytest.raises(UserError, match=r"^sft: the loss is not finite at step 1 of \d+ .*; no checkpoint was due yet; "):
        run_recipe(parse_recipe(table), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "artifacts").iterdir() if not path.name.startswith(".")] == []
