"""One distillation step, forward and backward: potstill against what else there is. Same weights, rows and precision.

    python benchmarks/kd_step.py --quick          # about two minutes on two cores
    python benchmarks/kd_step.py --shape cpu      # 250 M -> 82 M parameters, vocabulary 151,936

Each engine runs in a process of its own, in turn, `--rounds` times; ratios are taken round by round. Loss and gradient norm
are compared before any time is shown. Peers come from their published packages (`pip install 'potstill[bench]'`); what is
missing is named and left out. `--json` prints one object as the last line.

Engines: `potstill` as the distill stage computes it, teacher live; `trl`, TRL's GKD loss (beta = 0, forward KL) on the full
logits of both models, as its trainer does; `liger`, Liger's chunked JSD (beta = 0) in PyTorch on every position's hidden
state; `paper`, the soft cross-entropy of MiniLLM's and the paper's code on full logits, whose value is higher by the
teacher's entropy and whose gradient is the same.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# (prompt, response) tokens of eight instruction rows: 984 real tokens, 386 of them response, padded to 2,312
ROWS = [(24, 58), (201, 88), (12, 20), (150, 30), (38, 70), (90, 40), (48, 60), (35, 20)]
SHAPES = {
    "quick": {"vocab": 32_768, "student": (256, 4), "teacher": (512, 6)},
    "cpu": {"vocab": 151_936, "student": (512, 2), "teacher": (1024, 8)},
    "gpu": {"vocab": 151_936, "student": (896, 24), "teacher": (2048, 36)},
}
ENGINES = ("potstill", "trl", "liger", "paper")
NEEDS = {"trl": "trl", "liger": "liger_kernel"}


def build(shape: dict[str, Any], which: str, seed: int) -> Any:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    width, layers = shape[which]
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=shape["vocab"],
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        intermediate_size=4 * width,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config)


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


def step_of(engine: str, student: Any, teacher: Any, pairs: list[tuple[Any, Any]]) -> Any:
    """A function of nothing that returns the mean loss per response token, ready for backward."""
    import torch
    import torch.nn.functional as F

    count = sum(len(response) for _, response in pairs)
    if engine == "potstill":
        from potstill.divergences.forward_kl import ForwardKL
        from potstill.train.batches import pack
        from potstill.train.objectives import Distillation
        from potstill.train.signals import Live

        batch = pack(sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))).to(student.device)
        objective = Distillation(Live(teacher), ForwardKL(), 1.0, 1.0, student.config.vocab_size)
        return lambda: objective(student, batch).total / count
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

        return trl
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

        return liger

    def paper() -> Any:
        student_logits = logits(student)
        with torch.no_grad():
            teacher_probs = F.softmax(logits(teacher), dim=-1, dtype=torch.float32)
        log_probs = F.log_softmax(student_logits, dim=-1, dtype=torch.float32)
        products = torch.masked_fill(teacher_probs * log_probs, torch.isinf(student_logits), 0).sum(dim=-1)
        mask = (labels_BT[:, 1:] != -100).float()
        return -(products * mask).sum() / mask.sum()

    return paper


def measure(engine: str, shape_name: str, repeats: int) -> dict[str, float]:
    """In this process: loss, gradient norm, median seconds of a step, peak bytes above the loaded models."""
    import torch

    from potstill.edges.machine import peak_gpu_memory, peak_memory, reset_peak_memory

    shape = SHAPES[shape_name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    student = build(shape, "student", 1).to(device, dtype).train()
    teacher = build(shape, "teacher", 2).to(device, dtype).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(3)
    pairs = [tuple(torch.randint(0, shape["vocab"], (n,), generator=draw).tolist() for n in row) for row in ROWS]
    step = step_of(engine, student, teacher, pairs)
    reset_peak_memory()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else resident()
    seconds = []
    for _ in range(repeats + 1):
        student.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        loss = step()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    norm = torch.stack([p.grad.float().norm() for p in student.parameters() if p.grad is not None]).norm()
    peak = peak_gpu_memory() if device.type == "cuda" else peak_memory()
    return {"loss": loss.item(), "norm": norm.item(), "seconds": statistics.median(seconds[1:]), "bytes": peak - before}


def resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def in_a_process(engine: str, shape: str, repeats: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", engine, "--shape", shape, "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    if done.returncode:
        raise SystemExit(f"{engine} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape, two rounds")
    parser.add_argument("--shape", choices=SHAPES, default=None)
    parser.add_argument("--rounds", type=int, default=None, help="how often each engine has its turn")
    parser.add_argument("--repeats", type=int, default=2, help="steps measured in each turn, after a warm-up")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--save", type=Path, help="also write that object to a file")
    parser.add_argument("--one", choices=ENGINES, help=argparse.SUPPRESS)
    words = parser.parse_args()
    shape = words.shape or "quick"
    if words.one:
        print(json.dumps(measure(words.one, shape, words.repeats)))
        return
    missing = [engine for engine, module in NEEDS.items() if importlib.util.find_spec(module) is None]
    for engine in missing:
        print(f"{engine} is left out: not installed (pip install 'potstill[bench]')", file=sys.stderr)
    engines = [engine for engine in ENGINES if engine not in missing]
    rounds: list[dict[str, dict[str, float]]] = []
    for n in range(words.rounds or (2 if words.quick else 3)):
        rounds.append({engine: in_a_process(engine, shape, words.repeats) for engine in engines})
        print(f"round {n + 1}: " + ", ".join(f"{e} {r['seconds']:.2f} s" for e, r in rounds[-1].items()), file=sys.stderr)
    ours, others = rounds[0]["potstill"], [engine for engine in engines if engine != "potstill"]
    exact = [engine for engine in others if engine != "paper"]  # its loss includes the teacher's entropy
    gaps = {
        "loss_gap": max((abs(rounds[0][e]["loss"] / ours["loss"] - 1) for e in exact), default=0.0),
        "grad_gap": max((abs(rounds[0][e]["norm"] / ours["norm"] - 1) for e in others), default=0.0),
    }
    found: dict[str, Any] = {"shape": shape, "speedup": {}, "memory_ratio": {}, **gaps}
    print(f"\nlargest relative gap to potstill: loss {gaps['loss_gap']:.1e}, gradient norm {gaps['grad_gap']:.1e}\n")
    print("| engine | s per step | GB above the models | potstill is faster by | takes of its memory |")
    print("|---|---:|---:|---:|---:|")
    for engine in engines:
        seconds = [r[engine]["seconds"] for r in rounds]
        gigabytes = statistics.median(r[engine]["bytes"] for r in rounds) / 1e9
        line = f"| {engine} | {statistics.median(seconds):.2f} [{min(seconds):.2f}, {max(seconds):.2f}] | {gigabytes:.2f} |"
        if engine == "potstill":
            print(f"{line} | |")
            continue
        faster = [r[engine]["seconds"] / r["potstill"]["seconds"] for r in rounds]
        memory = [r["potstill"]["bytes"] / r[engine]["bytes"] for r in rounds]
        found["speedup"][engine] = {"live": round(statistics.median(faster), 2), "cached": None, "topk": None}
        found["memory_ratio"][engine] = {"live": round(statistics.median(memory), 4), "cached": None, "topk": None}
        times = f"{statistics.median(faster):.1f}× [{min(faster):.1f}, {max(faster):.1f}]"
        print(f"{line} {times} | {statistics.median(memory):.2f} |")
    names = ("torch", "transformers", "trl", "liger_kernel")
    packages = [name.replace("_", "-") for name in names if importlib.util.find_spec(name)]
    found["machine"] = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    found["versions"] = {name: version(name) for name in packages}
    found["rounds"] = rounds
    if words.save:
        words.save.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if words.json:
        print(json.dumps({key: value for key, value in found.items() if key != "rounds"}))


if __name__ == "__main__":
    main()
