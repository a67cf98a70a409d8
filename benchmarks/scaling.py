"""How time and memory of potstill's distillation grow: with response length, vocabulary, rows, and processes.

    python benchmarks/scaling.py --quick                  # all four, about five minutes on two cores
    python benchmarks/scaling.py --what rows              # 1,000 to 1,000,000 rows on disk: about 200 MB and a few minutes

`length` and `vocabulary`: one step, forward and backward without the optimiser, of four rows of random tokens; `live`, the
teacher beside the student, and `hidden`, its hidden states read back from the cache. `rows`: a token store and a teacher
cache of rows of eight tokens, 16 bytes a response token, written in one process and then opened and looked up in random
order in another; what the system keeps of files in its own memory is not the process's. `ranks`: the same recipe's distill
stage in one process and in two under torchrun on the CPU (gloo), one thread each and the same rows in every step, so that
the difference is what the second process adds. Every point has a process of its own, all of them in turn, `--rounds` times.
"""

import argparse
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from _bench import Measure, Memory, add_output, facts, hand_over, in_turn, resident, runner, shown, spread, table
from _models import SHAPES, build

POINTS = {  # by size: tiny is for tests
    "length": {"tiny": [8, 16], "quick": [32, 128, 512], "full": [32, 64, 128, 256, 512, 960]},
    "vocabulary": {"tiny": [512, 1_024], "quick": [8_192, 32_768, 131_072], "full": [8_192, 32_768, 65_536, 151_936, 262_144]},
    "rows": {"tiny": [100, 1_000], "quick": [1_000, 10_000, 100_000], "full": [1_000, 10_000, 100_000, 1_000_000]},
    "ranks": {"tiny": [1, 2], "quick": [1, 2], "full": [1, 2]},
}
SIGNALS = ("live", "hidden")
TINY = {"vocab": 512, "student": (64, 1), "teacher": (128, 1)}
BATCH, PROMPT, RESPONSE = 4, 32, 128  # rows of a step; tokens of each, where they are not what is varied
FEW, WIDTH = 4, 16  # tokens of a prompt and of a response, and bytes of a token, where rows are many
LOOKUPS = 2_000


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """In this process: one point."""
    kinds = {"step": step, "write": write, "read": read, "ranks": ranks}
    return kinds[job["kind"]](**{name: value for name, value in job.items() if name != "kind"})


def step(size: str, vocab: int | None, length: int, signal: str, repeats: int) -> dict[str, Any]:
    """Seconds of a step, the median after a warm-up, which fills the cache; peak bytes above the loaded models."""
    import torch

    from potstill.data.batches import pack
    from potstill.divergences.forward_kl import ForwardKL
    from potstill.edges.families import logits_of
    from potstill.losses.distillation import Distillation
    from potstill.teachers.cache import RowCache
    from potstill.teachers.signals import Cached, HiddenForm, Live

    shape = dict(TINY if size == "tiny" else SHAPES["quick"])
    shape["vocab"] = vocab or shape["vocab"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    student = build(shape, "student", 1).to(device, dtype).train()
    teacher = build(shape, "teacher", 2).to(device, dtype).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, shape["vocab"], (BATCH, PROMPT + length), generator=draw)
    batch = pack([(row[:PROMPT], row[PROMPT:]) for row in ids.numpy()]).to(device)
    with tempfile.TemporaryDirectory() as folder:
        said: Live | Cached = Live(teacher)
        if signal == "hidden":
            form = HiddenForm(teacher.get_output_embeddings(), logits_of(teacher.config))
            said = Cached(RowCache(Path(folder) / "cache", {}, form.width), form, lambda: teacher, ())
        objective = Distillation(said, ForwardKL(), 1.0, 1.0, shape["vocab"])
        memory, seconds = Memory(), []
        for n in range(repeats + 1):
            student.zero_grad(set_to_none=True)
            if n == 1:
                memory.again()
            begin = time.perf_counter()
            (objective(student, batch).total / (BATCH * length)).backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(seconds[1:]), "bytes": memory.above()}


def write(folder: str, rows: int) -> dict[str, Any]:
    """Seconds to write the store, and a cache of its rows one after another, as a first epoch does."""
    import numpy as np

    from potstill.data.store import Counts, TokenStore
    from potstill.teachers.cache import RowCache, keys_of

    def pairs() -> Iterator[tuple[list[int], list[int]]]:
        draw = np.random.default_rng(0)
        for _ in range(rows):
            ids = draw.integers(0, 32_768, 2 * FEW).tolist()
            yield ids[:FEW], ids[FEW:]

    begin = time.perf_counter()
    store = TokenStore.write(Path(folder) / "tokens", pairs(), Counts(), "rows")
    written = time.perf_counter()
    cache = RowCache(Path(folder) / "cache", {}, WIDTH)
    values = np.zeros((FEW, WIDTH), np.uint8)
    for key in keys_of(store):
        cache.append(key, values)
    sizes = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
    return {"store_seconds": written - begin, "cache_seconds": time.perf_counter() - written, "disk_bytes": sum(sizes)}


def read(folder: str, rows: int) -> dict[str, Any]:
    """Seconds to open both; lookups per second; peak resident bytes above the process before, and what stays."""
    import numpy as np

    from potstill.data.store import Counts, TokenStore
    from potstill.teachers.cache import RowCache, row_key

    order = np.random.default_rng(1).integers(0, rows, LOOKUPS)
    memory, before = Memory(), resident()
    begin = time.perf_counter()
    store = TokenStore(Path(folder) / "tokens", Counts())
    cache = RowCache(Path(folder) / "cache", {}, WIDTH)
    opened = time.perf_counter()
    keys = [row_key(*store[int(row)]) for row in order]
    hashed = time.perf_counter()
    lost = sum(1 for _ in cache.missing(keys))
    asked = time.perf_counter()
    out = np.empty((FEW, WIDTH), np.uint8)
    whole = all(cache.read(key, out) for key in keys)
    done = time.perf_counter()
    if lost or not whole or len(store) != rows:
        raise SystemExit(f"{rows:,} rows: some are not found again")
    peak = memory.above()
    gc.collect()
    return {
        "open_seconds": opened - begin,
        "keys_per_s": LOOKUPS / (hashed - opened),
        "lookups_per_s": LOOKUPS / (asked - hashed),
        "reads_per_s": LOOKUPS / (done - asked),
        "peak_bytes": peak,
        "kept_bytes": resident() - before,
    }


RECIPE = """
name = "ranks"
data = {{ kind = "jsonl", path = "{folder}/rows.jsonl" }}
prompts = {{ max_tokens = 256, max_prompt_tokens = 128 }}

[[stage]]
name = "teacher"
kind = "pretrain"
shape = {{ hidden_size = {width}, layers = 2, heads = 2, kv_heads = 1, intermediate_size = {wide}, positions = 256 }}
vocab_size = 2048
optim = {{ steps = 1, batch_size = 2 }}

[[stage]]
name = "kd"
kind = "distill"
student = "stage:teacher"
teacher = "stage:teacher"
signal = "live"
optim = {{ steps = {steps}, batch_size = 16, precision = "fp32", micro_batch_tokens = 1024 }}
validation = {{ times = 0 }}
"""


def ranks(processes: int, size: str) -> dict[str, Any]:
    """Seconds that the distill stage's loop took in so many processes, and the tokens it saw."""
    width, steps = (32, 3) if size == "tiny" else (256, 12)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        asked = "what do the numbers from {} to {} add up to, and how many of them are there?"
        answer = "The sum of the numbers from {0} to {1} is {2}; one finds it as the mean of {0} and {1} times their count."
        pairs = [(n, n + n % 9 + 1) for n in range(120)]
        rows = [
            {"instruction": asked.format(a, b), "response": answer.format(a, b, sum(range(a, b + 1))) * (1 + a % 3)}
            for a, b in pairs
        ]
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        recipe = RECIPE.format(folder=folder, width=width, wide=4 * width, steps=steps)
        (place / "ranks.toml").write_text(recipe, encoding="utf-8")
        potstill = ["-m", "potstill", "run", str(place / "ranks.toml"), "--out", str(place / "run"), "--quiet"]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *torchrun, *potstill]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"torchrun with {processes} of them failed:\n{(done.stdout + done.stderr)[-2000:]}")
        (artifact,) = place.glob("run/artifacts/kd-*/artifact.json")
        summary = json.loads(artifact.read_text(encoding="utf-8"))["summary"]
    return {"seconds": summary["training_seconds"], "tokens": summary["tokens"]}


def why_not_ranks() -> str | None:
    """Why ranks cannot be measured here; None when they can."""
    import torch.distributed as dist

    if importlib.util.find_spec("potstill.edges.ranks") is None:
        return "the installed potstill runs in one process"
    if not (dist.is_available() and dist.is_gloo_available()):
        return "this build of torch has no gloo"
    return None


Rounds = list[dict[Any, dict[str, Any]]]


def steps_table(what: str, words: argparse.Namespace, run: Measure, rounds: int) -> tuple[dict[str, Any], Rounds]:
    """`length` or `vocabulary`."""
    points = [(n, signal) for n in POINTS[what][words.size] for signal in SIGNALS]
    tokens = {n: BATCH * (n if what == "length" else (8 if words.size == "tiny" else RESPONSE)) for n, _ in points}

    def one(point: tuple[int, str]) -> dict[str, Any]:
        n, signal = point
        vocab = n if what == "vocabulary" else None
        job = {"size": words.size, "vocab": vocab, "length": tokens[n] // BATCH, "signal": signal, "repeats": words.repeats}
        return run({"kind": "step", **job})

    turns = in_turn(points, rounds, one)
    found: dict[str, Any] = {}
    lines = []
    for n in POINTS[what][words.size]:
        seconds = {signal: [turn[n, signal]["seconds"] for turn in turns] for signal in SIGNALS}
        sizes = {signal: [turn[n, signal]["bytes"] for turn in turns] for signal in SIGNALS}
        found[str(n)] = {signal: {"seconds": spread(seconds[signal]), "bytes": spread(sizes[signal])} for signal in SIGNALS}
        each = [1e3 * value / tokens[n] for value in seconds["hidden"]]
        gigabytes = [shown([size / 1e9 for size in sizes[signal]]) for signal in SIGNALS]
        lines.append([f"{n:,}", *(shown(seconds[signal], 3) for signal in SIGNALS), shown(each, 3), *gigabytes])
    name = "response tokens of a row" if what == "length" else "vocabulary"
    head = [name, "s, live", "s, hidden", "ms a response token, hidden", "GB above the models, live", "GB, hidden"]
    table(head, lines)
    return found, turns


def rows_table(words: argparse.Namespace, run: Measure, rounds: int) -> tuple[dict[str, Any], Rounds]:
    """`rows`: written once, read in every round."""
    counts = POINTS["rows"][words.size]
    with tempfile.TemporaryDirectory() as folder:
        places = {n: {"folder": f"{folder}/{n}", "rows": n} for n in counts}
        written = {n: run({"kind": "write", **places[n]}) for n in counts}
        turns = in_turn(counts, rounds, lambda n: run({"kind": "read", **places[n]}))
    found, lines = {}, []
    for n in counts:
        read = {name: [turn[n][name] for turn in turns] for name in turns[0][n]}
        found[str(n)] = {**written[n], **{name: spread(values) for name, values in read.items()}}
        rate = n / written[n]["cache_seconds"]
        megabytes = [shown([size / 1e6 for size in read[name]], 1) for name in ("peak_bytes", "kept_bytes")]
        speeds = [shown(read[name], 0) for name in ("lookups_per_s", "reads_per_s")]
        lines.append([f"{n:,}", f"{rate:,.0f}", f"{written[n]['disk_bytes'] / 1e6:,.1f}", shown(read["open_seconds"], 3)])
        lines[-1] += [*speeds, *megabytes]
    head = [
        "rows",
        "kept per s",
        "MB on disk",
        "s to open",
        "lookups per s",
        "rows read per s",
        "MB at the peak",
        "MB that stay",
    ]
    table(head, lines)
    return found, turns


def ranks_table(words: argparse.Namespace, run: Measure, rounds: int) -> tuple[dict[str, Any], Rounds]:
    """`ranks`."""
    counts = POINTS["ranks"][words.size]
    turns = in_turn(counts, rounds, lambda n: run({"kind": "ranks", "processes": n, "size": words.size}))
    found, lines = {}, []
    for n in counts:
        seconds = [turn[n]["seconds"] for turn in turns]
        faster = [turn[counts[0]]["seconds"] / turn[n]["seconds"] for turn in turns]
        rates = [turn[n]["tokens"] / turn[n]["seconds"] for turn in turns]
        found[str(n)] = {"seconds": spread(seconds), "tokens_per_s": spread(rates), "speedup": spread(faster)}
        lines.append([str(n), shown(seconds), shown(rates, 0), shown(faster) if n != counts[0] else ""])
    table(["processes", "s", "tokens per s", "times faster"], lines)
    return found, turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=(*POINTS, "all"), default=["all"], help="what is varied")
    parser.add_argument("--quick", action="store_true", help="fewer points, two rounds; the same as --size quick")
    parser.add_argument("--size", choices=("tiny", "quick", "full"), default=None, help="which points; tiny: for tests")
    parser.add_argument("--repeats", type=int, default=2, help="steps measured in each turn, after a warm-up")
    add_output(parser)
    words = parser.parse_args()
    if words.one:
        print(json.dumps(measure(json.loads(words.one))))
        return
    words.size = words.size or ("quick" if words.quick else "full")
    rounds = words.rounds or (3 if words.size == "full" else 2)
    run = runner(__file__, measure, words.here)
    found: dict[str, Any] = {"size": words.size, "left_out": {}}
    turns: dict[str, Any] = {}
    for what in POINTS if "all" in words.what else words.what:
        reason = why_not_ranks() if what == "ranks" else None
        if reason:
            print(f"ranks are left out: {reason}", file=sys.stderr)
            found["left_out"]["ranks"] = reason
            continue
        measured = {"rows": rows_table, "ranks": ranks_table}.get(what, partial(steps_table, what))(words, run, rounds)
        found[what], turns[what] = measured[0], [{str(point): told for point, told in turn.items()} for turn in measured[1]]
    hand_over({**found, **facts()}, turns, words)


if __name__ == "__main__":
    main()
