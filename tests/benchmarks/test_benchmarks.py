"""Benchmarks measure the smallest shapes, and their last line is the promised JSON."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
FACTS = {"machine", "versions", "created"}
ROWS = [
    {"instruction": f"Is {n} even?", "context": "" if n % 3 else f"Count to {n}.", "response": "It is. " * (1 + n % 4)}
    for n in range(40)
]


@pytest.fixture
def bench(monkeypatch, capsys):
    """Runs a benchmark in this process; what its last line says."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(script: str, *words: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [script, *words, "--here", "--json"])
        runpy.run_path(str(FOLDER / script), run_name="__main__")
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def in_order(spread: dict[str, float]) -> bool:
    return 0 < spread["min"] <= spread["median"] <= spread["max"]


def test_epochs(bench, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    saved = tmp_path / "new" / "found.json"
    own = ("hidden", "topk", "live")
    words = ("--shape", "tiny", "--rows", str(rows), "--epochs", "1", "2", "--rounds", "2", "--save", str(saved))
    found = bench("kd_epochs.py", *words, "--engines", *own)
    assert found.keys() >= FACTS | {"shape", "precision", "rows", "tokens", "response_tokens", "speedup", "memory_ratio"}
    assert found["loss_gap"]["hidden"] < 1e-3
    for engine in own:
        assert len(found["losses"][engine]) == 2
        of_two = found["epochs"]["2"][engine]
        assert in_order(of_two["seconds"])
        assert of_two["seconds"]["min"] > found["epochs"]["1"][engine]["seconds"]["min"]
        assert in_order(of_two["tokens_per_s"])
        assert (of_two["cache_bytes"] > 0) == (engine != "live")
    assert len(json.loads(saved.read_text())["rounds"]) == 2


def test_quantisers(bench):
    ways = ("rounding", "ggml Q4_0", "and making up")
    found = bench("quantize.py", "--quick", "--ways", *ways)
    assert found.keys() >= FACTS | {"model", "rows", "draws", "ways"}
    assert [*found["ways"]] == [*ways]
    for figures in found["ways"].values():
        assert in_order(figures["kl"])
        assert 0 <= figures["same_first"]["min"] <= 1
    assert found["ways"]["and making up"]["kl"]["max"] < found["ways"]["rounding"]["kl"]["min"]


def test_rollouts(bench, tmp_path):
    rows, saved = tmp_path / "rows.jsonl", tmp_path / "found.json"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ("--shape", "tiny", "--rows", str(rows), "--groups", "1", "4", "--rounds", "2", "--save", str(saved))
    found = bench("rollout.py", *words)
    assert found.keys() >= FACTS | {"shape", "answers", "max_new_tokens", "precision"}
    for group in ("1", "4"):
        for engine in ("potstill", "generate"):
            assert in_order(found["tokens_per_s"][group][engine])
            assert 1 <= found["tokens_per_answer"][group][engine] <= found["max_new_tokens"]
        assert in_order(found["speedup"][group]["generate"])
    for each in json.loads(saved.read_text())["rounds"]:
        assert all(one["answers"] == 8 for one in each.values())


def test_on_policy_step(bench, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ("--shape", "tiny", "--rows", str(rows), "--engines", "potstill", "--steps", "2", "--rounds", "2")
    found = bench("on_policy_step.py", *words)
    assert found.keys() >= FACTS | {"shape", "ms_per_token", "bytes", "tokens"}
    assert in_order(found["ms_per_token"]["potstill"])
    assert all(8 <= tokens <= 8 * found["max_new_tokens"] for tokens in found["tokens"]["potstill"])


def test_grpo_step(bench, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ("--shape", "tiny", "--rows", str(rows), "--engines", "potstill", "--steps", "2", "--rounds", "2")
    found = bench("grpo_step.py", *words, "--batch-size", "16")
    assert found.keys() >= FACTS | {"shape", "ms_per_token", "bytes", "tokens", "speedup", "memory_ratio"}
    assert all(2 * 16 <= tokens <= 2 * 16 * found["max_new_tokens"] for tokens in found["tokens"]["potstill"])
    assert found["learned"] == found["tokens"]  # no answer is left out: every group differs


def test_scaling(bench):
    what = ("length", "vocabulary", "rows")
    found = bench("scaling.py", "--what", *what, "--size", "tiny", "--rounds", "1", "--repeats", "1")
    assert found.keys() >= FACTS | {*what}
    for what in ("length", "vocabulary"):
        assert all(in_order(point[signal]["seconds"]) for point in found[what].values() for signal in ("live", "hidden"))
    assert list(found["rows"]) == ["100", "1000"]
    for point in found["rows"].values():
        assert in_order(point["lookups_per_s"])
        assert in_order(point["reads_per_s"])
        assert point["disk_bytes"] > 0


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_trl_trains_the_same(tmp_path):
    command = [sys.executable, str(FOLDER / "kd_epochs.py"), "--shape", "tiny", "--epochs", "1", "2", "--rounds", "1", "--json"]
    done = subprocess.run(
        [*command, "--engines", "live", "trl"], capture_output=True, text=True, env={**os.environ}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loss_gap"]["trl"] < 1e-4
    assert in_order(found["speedup"]["2"]["trl"]["live"])


@pytest.mark.parametrize("script", ["kd_step.py", "kd_epochs.py", "scaling.py", "rollout.py"])
def test_help_needs_no_torch(script):
    command = [sys.executable, "-X", "importtime", str(FOLDER / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--rounds" in done.stdout
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


def test_sandbox(bench, tmp_path):
    saved = tmp_path / "found.json"
    found = bench("sandbox.py", "--runs", "4", "--rounds", "2", "--workers", "2", "--save", str(saved))
    assert found.keys() >= FACTS | {"backends", "workers", "runs"}
    assert "bare" in found["backends"]
    for backend in found["backends"].values():
        assert in_order(backend["ms"])
        assert in_order(backend["runs_per_s"])
        assert backend["ms_over_bare"]["min"] <= backend["ms_over_bare"]["max"]
    assert len(json.loads(saved.read_text())["rounds"]) == 2
