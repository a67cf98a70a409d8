"""One distillation step, forward and backward: potstill against what else there is. Same weights, rows and precision.

    python benchmarks/kd_step.py --quick          # about two minutes on two cores
    python benchmarks/kd_step.py --shape cpu      # 250 M -> 82 M parameters, vocabulary 151,936
    POTSTILL_REAL_MODELS=.models python benchmarks/kd_step.py --shape real --precision bf16   # SmolLM2 -> 12 of its layers

Each engine runs in a process of its own, in turn, `--rounds` times; ratios are taken round by round. Loss and gradient norm
are compared before any time is shown. Peers come from their published packages (`pip install 'potstill[bench]'`); what is
missing is named and left out. `--json` prints one object as the last line.

Engines: `live`, potstill's distill stage while it first sees a row, the teacher beside the student; `cached`, the same rows
in every later epoch, the teacher's hidden states read back from disk; `topk`, the same with 64 probabilities a token instead
(a coarser loss, so its value is lower); `trl`, TRL's GKD loss (beta = 0, forward KL) on the full
logits of both models, as its trainer does; `liger`, Liger's chunked JSD (beta = 0) in PyTorch on every position's hidden
state; `trl_distillation`, the loss of TRL's stable DistillationTrainer (beta = 0) on prompts padded left and answers padded
right, as that trainer lays them out; `trl_compacted`, the same loss given only the response positions, as it does by itself on
a GPU; `paper`, the soft cross-entropy of MiniLLM's and the paper's code on full logits, whose value is higher by the
teacher's entropy and whose gradient is the same.

`--json`'s `matmul_share`: the step's floating-point operations on real tokens, none of them spent on padding or on prompts in
the head, over the time they take, as a share of what this machine's own matrix products of the same shapes reach in the same
round; of `live` and of `cached`.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from _bench import facts, hand_over, in_a_process, left_out, resident, shown, synchronize
from _models import SHAPES, build, model_of

# (prompt, response) tokens of eight instruction rows: 984 real tokens, 386 of them response, padded to 2,312
ROWS = [(24, 58), (201, 88), (12, 20), (150, 30), (38, 70), (90, 40), (48, 60), (35, 20)]
# of sixteen rows of Dolly: 1,799 real tokens, 1,080 of them response
REAL_ROWS = [(14, 9), (16, 22), (17, 31), (19, 38), (21, 44), (22, 52), (24, 57), (27, 63)]
REAL_ROWS += [(29, 68), (33, 71), (38, 76), (46, 83), (58, 92), (79, 104), (118, 119), (158, 151)]
OURS = ("live", "cached", "topk")
PEERS = (
    "triton",
    "trl",
    "trl_distillation",
    "trl_compacted",
    "liger",
    "paper",
)  # triton: our own kernel, on a GPU, against `live` without it
ENGINES = (*OURS, *PEERS, "matmul")
TOP_K = 64
NEEDS = {"trl": "trl", "trl_distillation": "trl", "trl_compacted": "trl", "liger": "liger_kernel"}


def rows_of(shape: dict[str, Any]) -> list[tuple[int, int]]:
    return REAL_ROWS if "inner" in shape else ROWS


def padded(pairs: list[tuple[Any, Any]]) -> tuple[Any, Any, Any]:
    """ids, attention mask and labels, right-padded as trainers do."""
    import torch

    width = max(len(prompt) + len(response) for prompt, response in pairs)
    ids_BT = torch.zeros((len(pairs), width), dtype=torch.long)
    mask_BT, labels_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, -100)
    for b, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        ids_BT[b, :end] = torch.tensor([*prompt, *response])
        mask_BT[b, :end] = 1
        labels_BT[b, len(prompt) : end] = ids_BT[b, len(prompt) : end]
    return ids_BT, mask_BT, labels_BT


def signal_of(engine: str, teacher: Any, batches: list[Any]) -> Any:
    """The teacher live, or a cache in a temporary folder that already holds the batches' rows."""
    import tempfile

    from potstill.edges.families import logits_of
    from potstill.teachers.cache import RowCache
    from potstill.teachers.signals import Cached, HiddenForm, Live, TopKForm

    if engine in ("live", "triton"):
        return Live(teacher)
    head, made = teacher.get_output_embeddings(), logits_of(teacher.config)
    form = HiddenForm(head, made) if engine == "cached" else TopKForm(head, made, TOP_K, 1.0, head.out_features)
    cache = RowCache(Path(tempfile.mkdtemp(prefix="kd_step-")), {}, form.width)
    signal = Cached(cache, form, lambda: teacher, ())
    for batch in batches:
        signal(batch)
    return signal


def work_of(shape: dict[str, Any]) -> dict[str, list[tuple[int, int, int]]]:
    """The matrix products of a step on real tokens alone, as (rows, inner, columns): of the student and head, of the teacher.

    Attention's own products are left out: a few per cent of the whole at these lengths.
    """

    def body(width: int, layers: int, tokens: int) -> list[tuple[int, int, int]]:
        shared, inner = shape.get("kv", max(1, width // 128) * 64), shape.get("inner", 4 * width)
        return layers * [(tokens, width, 2 * width), (tokens, width, 2 * shared), *3 * [(tokens, width, inner)]]

    rows = rows_of(shape)
    tokens, learned = sum(a + b for a, b in rows), sum(b for _, b in rows)
    student, teacher = (shape[which] for which in ("student", "teacher"))
    once = body(*student, tokens)
    heads = [*3 * [(learned, student[0], shape["vocab"])], (learned, teacher[0], shape["vocab"])]
    return {"cached": 3 * once + heads, "live": 3 * once + heads + body(*teacher, tokens)}


def matmul(shape: dict[str, Any], precision: str, repeats: int) -> dict[str, float]:
    """Floating-point operations a second of plain matrix products, weighted as a step is made of them."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    found = {}
    for name, products in work_of(shape).items():
        seconds = 0.0
        for product in set(products):
            rows, inner, columns = product
            a, b = torch.randn(rows, inner, device=device, dtype=dtype), torch.randn(inner, columns, device=device, dtype=dtype)
            times = []
            for _ in range(repeats + 1):
                synchronize(device)
                begin = time.perf_counter()
                a @ b
                synchronize(device)
                times.append(time.perf_counter() - begin)
            seconds += products.count(product) * min(times)
        found[name] = sum(2.0 * m * k * n for m, k, n in products) / seconds
    return found


def step_of(engine: str, student: Any, teacher: Any, pairs: list[tuple[Any, Any]]) -> list[Any]:
    """Functions of nothing that return losses, each ready for backward: their sum is the mean loss per response token.

    There is one for each forward pass that the step takes: potstill's loop chooses how many, its peers read all rows at once.
    """
    import torch
    import torch.nn.functional as F

    count = sum(len(response) for _, response in pairs)
    if engine in (*OURS, "triton"):
        os.environ["POTSTILL_KERNEL"] = "triton" if engine == "triton" else "plain"
        from potstill.data.batches import micro_batches, pack
        from potstill.divergences.forward_kl import ForwardKL
        from potstill.losses.distillation import Distillation
        from potstill.train.loop import Optim

        groups = micro_batches([sum(map(len, pair)) for pair in pairs], Optim().pass_tokens(student.config.hidden_size))
        batches = [pack([pairs[i] for i in group]).to(student.device) for group in groups]
        objective = Distillation(signal_of(engine, teacher, batches), ForwardKL(), 1.0, 1.0, student.config.vocab_size)
        return [lambda batch=batch: objective(student, batch).total / count for batch in batches]
    ids_BT, mask_BT, labels_BT = (t.to(student.device) for t in padded(pairs))

    def logits(model: Any) -> Any:
        return model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1, :]

    if engine == "trl":
        from trl.experimental.gkd import GKDTrainer

        def trl() -> Any:
            student_logits = logits(student)
            with torch.no_grad():
                teacher_logits = logits(teacher)
            return GKDTrainer.generalized_jsd_loss(student_logits, teacher_logits, labels_BT[:, 1:], beta=0.0)

        return [trl]
    if engine in ("trl_distillation", "trl_compacted"):
        return [distillation_trainer(student, teacher, pairs, compacted=engine == "trl_compacted")]
    if engine == "liger":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=256)

        def hidden(model: Any) -> Any:
            return model.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state[:, :-1]

        def liger() -> Any:
            ours = hidden(student)
            with torch.no_grad():
                theirs = hidden(teacher)
            flat = [states.reshape(-1, states.shape[-1]) for states in (ours, theirs)]
            return loss(flat[0], student.lm_head.weight, flat[1], teacher.lm_head.weight, labels_BT[:, 1:].reshape(-1))

        return [liger]

    def paper() -> Any:
        student_logits = logits(student)
        with torch.no_grad():
            teacher_probs = F.softmax(logits(teacher), dim=-1, dtype=torch.float32)
        log_probs = F.log_softmax(student_logits, dim=-1, dtype=torch.float32)
        products = torch.masked_fill(teacher_probs * log_probs, torch.isinf(student_logits), 0).sum(dim=-1)
        mask = (labels_BT[:, 1:] != -100).float()
        return -(products * mask).sum() / mask.sum()

    return [paper]


def distillation_trainer(student: Any, teacher: Any, pairs: list[tuple[Any, Any]], *, compacted: bool) -> Any:
    """TRL's stable trainer: prompts padded left, answers padded right, the hidden states of the latter."""
    import torch
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    before, after = (max(len(pair[part]) for pair in pairs) for part in (0, 1))
    ids_BT = torch.zeros((len(pairs), before + after), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for b, (prompt, response) in enumerate(pairs):
        row = slice(before - len(prompt), before + len(response))
        ids_BT[b, row] = torch.tensor([*prompt, *response])
        mask_BT[b, row] = 1
    ids_BT, mask_BT = ids_BT.to(student.device), mask_BT.to(student.device)
    learned_BK = mask_BT[:, before:]

    def hidden(model: Any) -> Any:
        states = model.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
        return states[:, before - 1 : -1]

    def loss() -> Any:
        with torch.no_grad():
            theirs = hidden(teacher)
        ours, learned = hidden(student), learned_BK
        if compacted:
            valid = learned_BK.bool()
            ours, theirs, learned = ours[valid][None], theirs[valid][None], learned_BK[valid][None]
        heads = (student.lm_head.weight, teacher.lm_head.weight)
        return _chunked_divergence_loss(ours, theirs, *heads, learned, beta=0.0)[0]

    return loss


def measure(engine: str, shape_name: str, precision: str, repeats: int) -> dict[str, float]:
    """In this process: loss, gradient norm, median seconds of a step, peak bytes above the loaded models."""
    import torch

    from potstill.edges.machine import peak_gpu_memory, peak_memory, reset_peak_memory

    shape = SHAPES[shape_name]
    if engine == "matmul":
        return matmul(shape, precision, repeats)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # on a CPU bf16 is autocast over float32
    student = build(shape, "student", 1).to(device, dtype).train()
    teacher = build(shape, "teacher", 2).to(device, dtype).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(3)
    pairs = [tuple(torch.randint(0, shape["vocab"], (n,), generator=draw).tolist() for n in row) for row in rows_of(shape)]
    before = torch.cuda.memory_allocated() if device.type == "cuda" else resident()
    step = step_of(engine, student, teacher, pairs)
    reset_peak_memory()
    seconds = []
    for _ in range(repeats + 1):
        student.zero_grad(set_to_none=True)
        synchronize(device)
        begin = time.perf_counter()
        loss = 0.0
        for part in step:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16" and device.type == "cpu"):
                mean = part()
            mean.backward()
            loss += mean.detach()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    norm = torch.stack([p.grad.float().norm() for p in student.parameters() if p.grad is not None]).norm()
    peak = peak_gpu_memory() if device.type == "cuda" else peak_memory()
    return {"loss": float(loss), "norm": norm.item(), "seconds": statistics.median(seconds[1:]), "bytes": peak - before}


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape, two rounds")
    parser.add_argument("--shape", choices=SHAPES, default=None)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=None, help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--rounds", type=int, default=None, help="how often each engine has its turn")
    parser.add_argument("--repeats", type=int, default=2, help="steps measured in each turn, after a warm-up")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--save", type=Path, help="also write that object to a file")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a measurement for this process, in JSON
    words = parser.parse_args()
    shape = words.shape or "quick"
    if words.one:
        print(json.dumps(measure(**json.loads(words.one))))
        return
    model_of(shape)
    precision = words.precision or ("bf16" if has_gpu() else "fp32")
    missing = left_out(NEEDS)
    if not has_gpu():
        missing.add("triton")
    engines = [engine for engine in ENGINES if engine not in missing]
    rounds: list[dict[str, dict[str, float]]] = []
    for n in range(words.rounds or (2 if words.quick else 3)):
        jobs = {
            engine: {"engine": engine, "shape_name": shape, "precision": precision, "repeats": words.repeats}
            for engine in engines
        }
        rounds.append({engine: in_a_process(__file__, job) for engine, job in jobs.items()})
        times = [f"{e} {r['seconds']:.2f} s" for e, r in rounds[-1].items() if e != "matmul"]
        print(f"round {n + 1}: {', '.join(times)}", file=sys.stderr)
    live, peers = rounds[0]["live"], [engine for engine in engines if engine in PEERS]
    exact = [engine for engine in peers if engine != "paper"]  # its loss includes the teacher's entropy
    gaps = {
        "loss_gap": max((abs(rounds[0][e]["loss"] / live["loss"] - 1) for e in exact), default=0.0),
        "grad_gap": max((abs(rounds[0][e]["norm"] / live["norm"] - 1) for e in peers), default=0.0),
        "cached_loss_gap": abs(rounds[0]["cached"]["loss"] / live["loss"] - 1),
        "cached_grad_gap": abs(rounds[0]["cached"]["norm"] / live["norm"] - 1),
    }
    told = "relative gaps: the peers' loss {loss_gap:.1e}, their gradient norm {grad_gap:.1e}; "
    told += "cached to live, loss {cached_loss_gap:.1e}, gradient norm {cached_grad_gap:.1e}"
    print(f"\n{told.format(**gaps)}\n")
    found: dict[str, Any] = {"shape": shape, "precision": precision, "speedup": {}, "memory_ratio": {}, **gaps}
    print("| engine | s per step | GB above the models |" + "".join(f" {ours} is faster by |" for ours in OURS))
    print("|---|---:|---:|" + 3 * "---:|")
    for engine in engines:
        if engine == "matmul":
            continue
        seconds = [r[engine]["seconds"] for r in rounds]
        gigabytes = statistics.median(r[engine]["bytes"] for r in rounds) / 1e9
        line = f"| {engine} | {shown(seconds, 2)} | {gigabytes:.2f} |"
        if engine in OURS:
            print(line + 3 * " |")
            continue
        faster = {ours: [r[engine]["seconds"] / r[ours]["seconds"] for r in rounds] for ours in OURS}
        memory = {ours: [r[ours]["bytes"] / r[engine]["bytes"] for r in rounds] for ours in OURS}
        found["speedup"][engine] = {ours: round(statistics.median(faster[ours]), 2) for ours in OURS}
        found["memory_ratio"][engine] = {ours: round(statistics.median(memory[ours]), 4) for ours in OURS}
        print(
            line
            + "".join(f" {shown(faster[ours], 1)}× at {statistics.median(memory[ours]):.3f} of its memory |" for ours in OURS)
        )
    flops = {name: sum(2.0 * m * k * n for m, k, n in products) for name, products in work_of(SHAPES[shape]).items()}
    shares = {name: [flops[name] / r[name]["seconds"] / r["matmul"][name] for r in rounds] for name in flops}
    found["matmul_share"] = {name: round(statistics.median(values), 3) for name, values in shares.items()}
    rates = {name: statistics.median(r["matmul"][name] for r in rounds) / 1e9 for name in flops}
    print("\nshare of the machine's own matrix-product rate, on real tokens' work only: ", end="")
    print("; ".join(f"{name} {shown(shares[name], 2)} of {rates[name]:.0f} GFLOP/s" for name in flops))
    hand_over(found | facts(), rounds, words)


if __name__ == "__main__":
    main()
