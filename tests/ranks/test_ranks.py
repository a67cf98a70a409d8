"""Two processes end as one does; one that fails or dies ends both, once, and the run goes on from its checkpoint."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cases
import psutil
import pytest
import torch
from tiny_parts import chat_tokenizer, tiny_model, write_rows

from potstill.core.artifact import file_hash
from potstill.data.batches import pack
from potstill.edges.models import save_model
from potstill.losses.head import fused_head
from potstill.run.stopper import SAVING
from potstill.train import checkpoint
from potstill.train.team import IDLE, shares

TOLERANCE = 1e-11  # of float64 weights between 0.001 and 1, after eight steps of AdamW
STEPS = 40

RECIPE = """
name = "two"
data = {{ kind = "jsonl", path = "{root}/rows.jsonl", context = "context", splits = {{ validation = 0.1, test = 0.1 }} }}
prompts = {{ max_tokens = 256, max_prompt_tokens = 200 }}
checkpoint = {{ every_steps = 6 }}

[[stage]]
name = "kd"
kind = "distill"
student = "path:{root}/student"
teacher = "path:{root}/student"
optim = {{ steps = {steps}, batch_size = 4 }}
validation = {{ times = 2, rows = 2, max_new_tokens = 2 }}
"""


def environment() -> dict[str, str]:
    source = str(Path(__file__).resolve().parents[2] / "src")
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source, "HF_HUB_OFFLINE": "1"}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], env=environment(), capture_output=True, text=True, timeout=120)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LAUNCHED = ("-c", "import sys; from potstill.edges.ranks import launch; sys.exit(launch(sys.argv[1:], 2))")


def potstill(recipe: Path, out: Path, *more: str) -> tuple[str, ...]:
    return "-m", "potstill", "run", str(recipe), "--out", str(out), "--processes", "2", "--quiet", *more


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    store = cases.made_store(root / "tokens")
    cases.trained("kd", store, root / "one-then-two", stop=5)
    tokenizer = chat_tokenizer(400)
    save_model(tiny_model("qwen2", len(tokenizer), attention_dropout=0.1), tokenizer, root / "student")
    write_rows(root / "rows.jsonl")
    (root / "two.toml").write_text(RECIPE.format(root=root, steps=STEPS))
    return root


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    done = run(*TORCHRUN, cases.__file__, "agreement", str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "results.pt")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    store = cases.TokenStore(folder / "tokens", cases.Counts(rows=cases.ROWS))
    found = {case: cases.trained(case, store, folder / f"one-{case}") for case in cases.CASES}
    return {**found, "bf16": cases.trained("sft-bf16", store, folder / "one-bf16")}


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    assert a["weights"].keys() == b["weights"].keys()
    return max(float((a["weights"][name] - b["weights"][name]).abs().max()) for name in a["weights"])


def figures_agree(a: dict[str, Any], b: dict[str, Any]) -> bool:
    pairs = zip(a["figures"], b["figures"], strict=True)
    return all(x.keys() == y.keys() and all(abs(x[k] - y[k]) < 1e-9 for k in x) for x, y in pairs)


@pytest.mark.parametrize("case", cases.CASES)
def test_two_processes_end_as_one_does(results: Any, alone: Any, case: str) -> None:
    assert distance(results[case], alone[case]) < TOLERANCE
    assert figures_agree(results[case], alone[case])


def test_layers_that_run_again_end_in_the_same_bits(alone: Any) -> None:
    assert distance(alone["recomputed"], alone["sft-qwen2"]) == 0


def test_in_bfloat16_they_differ_by_its_rounding(results: Any, alone: Any) -> None:
    """Adam turns a gradient near zero, whose sign is rounding, into a whole step: weights may be a few steps apart."""
    assert distance(results["bf16"], alone["bf16"]) < 6 * cases.TRAINING.lr  # each rounds its own part of the weights by chance
    pairs = zip(results["bf16"]["figures"], alone["bf16"]["figures"], strict=True)
    assert all(abs(x["loss"] - y["loss"]) < 0.01 * y["loss"] for x, y in pairs)


def test_the_law_rejects_averaged_means_of_processes(results: Any, alone: Any) -> None:
    assert distance(results["broken"], alone["sft-qwen2"]) > 1e6 * TOLERANCE


def test_one_process_stops_and_two_go_on(results: Any, alone: Any) -> None:
    assert distance(results["one, then two"], alone["kd"]) < TOLERANCE
    assert figures_agree(results["one, then two"], alone["kd"])


def test_two_processes_stop_and_two_go_on_to_the_same_bits(results: Any) -> None:
    assert distance(results["two, then two"], results["kd"]) == 0


@pytest.mark.parametrize("spoil", ["nothing", "cut", "lost", "state"])
def test_two_processes_stop_and_one_goes_on(
    results: Any, alone: Any, folder: Path, tmp_path: Path, spoil: str, capsys: Any
) -> None:
    store = cases.TokenStore(folder / "tokens", cases.Counts(rows=cases.ROWS))
    copied(folder / "two-then-one", tmp_path)
    older, newest = sorted((tmp_path / "checkpoints").iterdir())
    assert [older.name, newest.name] == ["step-000000004", "step-000000005"], "asked of one process, done by both"
    files = sorted(newest.glob("*.safetensors"))
    assert len(files) == 2
    match spoil:
        case "cut":
            files[1].write_bytes(files[1].read_bytes()[:-7])
        case "lost":
            files[1].unlink()
        case "state":
            (newest / "state.json").write_text("{")
    assert distance(cases.trained("kd", store, tmp_path, said="lines"), alone["kd"]) < TOLERANCE  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert f"continues from step {5 if spoil == 'nothing' else 4} of 8" in said
    assert ("step-000000005 is damaged; an older checkpoint is tried" in said) == (spoil != "nothing")


def test_the_law_rejects_resuming_without_averages(
    results: Any, alone: Any, folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def forgetful(path: Path, tensors: dict[str, Any]) -> None:
        load(path, {name: t for name, t in tensors.items() if not name.startswith("optim.exp_avg")})

    load = checkpoint.load_shards
    monkeypatch.setattr(checkpoint, "load_shards", forgetful)
    copied(folder / "two-then-one", tmp_path)
    store = cases.TokenStore(folder / "tokens", cases.Counts(rows=cases.ROWS))
    assert distance(cases.trained("kd", store, tmp_path), alone["kd"]) > 1e6 * TOLERANCE  # type: ignore[arg-type]


def copied(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target, dirs_exist_ok=True)


def test_a_mistake_met_by_one_process_is_told_once_and_ends_both(folder: Path) -> None:
    done = run(*LAUNCHED, cases.__file__, "one_fails", str(folder))
    assert done.stderr == "error: only here: a row is wrong; mend it\n"
    assert done.returncode == 2


def test_a_mistake_met_by_both_is_told_once(folder: Path, tmp_path: Path) -> None:
    done = run(*potstill(folder / "two.toml", tmp_path / "out", "--set", "kd.optim.lr=99"))
    assert done.returncode == 2
    assert done.stderr == "two.toml: 1 problem\n  kd.optim.lr = 99  must be at most 1\n"


def interrupted(words: tuple[str, ...], out: Path, lines: int, how: signal.Signals) -> tuple[int, str]:
    """Run; signal once so many figures are there: SIGKILL goes to the second process alone."""
    process = subprocess.Popen(
        [sys.executable, *words], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        logs = list(out.glob("artifacts/.work-kd-*/metrics.jsonl"))
        if logs and logs[0].read_bytes().count(b"\n") >= lines:
            break
        time.sleep(0.001)
    if how == signal.SIGKILL:
        workers = psutil.Process(process.pid).children(recursive=True)
        (second,) = [worker for worker in workers if worker.environ().get("RANK") == "1"]
        second.kill()
    else:
        process.send_signal(how)
    _, told = process.communicate(timeout=60)
    return process.returncode, told


def test_killed_or_stopped_a_run_goes_on_to_the_same_bits(results: Any, folder: Path, tmp_path: Path) -> None:
    straight, broken = folder / "straight", tmp_path / "broken"
    words = potstill(folder / "two.toml", broken)
    status, told = interrupted(words, broken, 9, signal.SIGKILL)
    assert status == 2, told
    assert told.startswith(
        "error: process 0 of 2 lost another one, which was killed, ran out of memory, or cannot be reached ("
    )
    assert told.endswith("the last checkpoint are kept: run the same command again to go on\n")
    assert told.count("\n") == 1
    (work,) = broken.glob("artifacts/.work-kd-*")
    assert max(path.name for path in (work / "checkpoints").iterdir()) >= "step-000000006"
    status, told = interrupted(words, broken, 16, signal.SIGINT)
    assert status == 130, told
    # the word that it stops comes from a thread, which a busy machine may let speak late or not at all
    (end,) = (line for line in told.splitlines() if line != SAVING)
    assert end.startswith("kd: stopped at step ")
    assert run(*words).returncode == 0
    ((a,), (b,)) = (list(out.glob("artifacts/kd-*")) for out in (straight, broken))
    assert file_hash(a / "model.safetensors") == file_hash(b / "model.safetensors")
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()
    assert not list(broken.glob("artifacts/.work-*"))
    assert not (b / "checkpoints").exists()


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_rows_are_dealt_out_once_and_evenly(count: int) -> None:
    lengths = [5, 90, 7, 7, 33, 12, 60, 1, 1, 41]
    parts = shares(lengths, count)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in part) for part in parts]
    assert max(loads) - min(loads) <= max(lengths)
    assert parts == shares(list(lengths), count)


def test_a_process_without_rows_adds_nothing(tmp_path: Path) -> None:
    model = cases.student()
    loss = cases.objective("kd", tmp_path)(model, IDLE)
    assert loss.total.item() == 0
    assert loss.parts == {}
    loss.total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters()), "every weight takes part in the sum"
    hidden, head = torch.zeros(0, 8, requires_grad=True), torch.nn.Linear(8, 5)
    fused_head(hidden, head, lambda logits, _, tokens: (logits.sum(), {})).total.backward()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()
    assert len(pack([([1], [2])]).target_N) == 1
