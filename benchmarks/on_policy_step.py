"""Whole on-policy steps: the student answers, the teacher reads, loss and update; potstill against TRL.

    python benchmarks/on_policy_step.py --quick                           # under four minutes on two cores
    python benchmarks/on_policy_step.py --shape real --rows rows.jsonl    # SmolLM2 as student and teacher

Each engine runs in a process of its own, in turn, `--rounds` times; ratios are taken round by round. Both have the same
weights, prompts as token ids in the same order, limits, precision and optimiser, sample at temperature 1 from the whole
vocabulary, and learn by the reverse KL over the whole vocabulary at every token that was drawn. They draw other random
numbers, so the answers differ, and what is compared is seconds per generated token; both counts are printed, and the mean
divergence of the first step, which must agree but for sampling. Models with random weights never end an answer by
themselves: a share of their vocabulary counts as ends, so that lengths are uneven as they are in life.

Engines: `potstill` is `fit` as the distill stage runs it with samples = { share = 1 }. `trl` is TRL's stable
DistillationTrainer, without evaluation, checkpoints, logging and gradient checkpointing, its own generation on: `generate` of
transformers over the whole batch, padded on the left, which is its way on a CPU.
"""

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _bench import Memory, add_output, facts, hand_over, in_turn, left_out, runner, shown, spread, table
from _models import build, model_of
from kd_epochs import Run, prepare, shape_of

RUNS = {
    "tiny": Run(8, 4, 64),
    "quick": Run(16, 8, 128),
    "cpu": Run(16, 8, 256),
    "real": Run(32, 16, 256),
    "gpu": Run(256, 64, 512),
}
NEW = {"tiny": 16, "quick": 64, "cpu": 64, "real": 128, "gpu": 256}  # most tokens of an answer
MEAN = 24  # tokens of an answer where weights are random
OWN = "potstill"
ENGINES = (OWN, "trl")
OPTIM = {"lr": 1e-5, "weight_decay": 0.01, "betas": (0.9, 0.999), "clip": 1.0}
SEED = 0


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """In this process: seconds, generated tokens and peak bytes of some steps, the first one's divergence."""
    import torch

    folder, shape = Path(job["folder"]), shape_of(job["shape"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student, teacher = (build(shape, which, seed).to(device) for which, seed in (("student", 1), ("teacher", 2)))
    if job["shape"] == "real":
        student = build(shape, "teacher", 0).to(device).requires_grad_(True)
    teacher = teacher.to(torch.bfloat16 if job["precision"] == "bf16" else torch.float32).eval().requires_grad_(False)
    if job["shape"] != "real":
        ends = list(range(0, shape["vocab"], MEAN))
        student.generation_config.eos_token_id = ends
    prompts = [prompt for prompt, _ in json.loads((folder / "rows.json").read_text())]
    with tempfile.TemporaryDirectory() as work:
        return (ours if job["engine"] == "potstill" else trl)(job, student, teacher, prompts, Path(work))


class Clock:
    """Seconds and peak of memory from the end of the first step, which warms caches, to that of the last."""

    def __init__(self, steps: int) -> None:
        self.steps, self.found = steps, {}

    def start(self) -> None:
        self._memory, self._begun = Memory(), time.perf_counter()

    def after(self, step: int) -> None:
        import torch

        if step == self.steps:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.found = {"seconds": time.perf_counter() - self._begun, "bytes": self._memory.above()}


def ours(job: dict[str, Any], student: Any, teacher: Any, prompts: list[list[int]], folder: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from potstill.core.progress import Progress
    from potstill.data.store import Counts, TokenStore
    from potstill.divergences.reverse_kl import ReverseKL
    from potstill.losses.distillation import Distillation
    from potstill.rollouts.local import Local
    from potstill.teachers.signals import Live
    from potstill.train.loop import Optim, data_of, fit
    from potstill.train.practice import Practice, Samples
    from potstill.train.work import Work

    clock = Clock(job["steps"])

    class Watched(Progress):
        def update(self, done: int, total: int, what: str = "step", start: int = 0, **figures: str) -> None:
            if what == "step":
                clock.after(done)

    batch, precision = job["batch_size"], job["precision"]
    optim = Optim(**OPTIM, schedule="constant", steps=job["steps"], batch_size=batch, precision=precision)
    samples = Samples(max_new_tokens=job["max_new_tokens"])
    work = Work(folder / "work", "kd", progress=Watched("quiet"))
    store = TokenStore.write(work.folder / "tokens", [(prompt, [0]) for prompt in prompts], Counts(), "rows")
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    engine = Local(student, tokenizer, [tokenizer.eos_token_id], precision=precision)
    practice = Practice(data_of(store, optim, SEED), samples, engine, batch, SEED, lambda done, total: None)
    objective = Distillation(Live(teacher), ReverseKL(), 1.0, 1.0, student.config.vocab_size)
    clock.start()
    totals = fit(student, store, objective, optim, work, seed=SEED, lessons=practice)
    first = work.metrics.read()[0]["samples_divergence"]
    return {**clock.found, "tokens": totals.generated_tokens, "learned": totals.sampled_tokens, "divergence": first}


def steps_of(job: dict[str, Any], model: Any, folder: Path) -> dict[str, Any]:
    """What all of TRL's trainers are told here: the steps alone, without evaluation, checkpoints and logging."""
    on_gpu, (beta1, beta2) = model.device.type == "cuda", OPTIM["betas"]
    return {
        "output_dir": str(folder),
        "max_completion_length": job["max_new_tokens"],
        "shuffle_dataset": False,
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["batch_size"],
        "gradient_accumulation_steps": 1,
        "learning_rate": OPTIM["lr"],
        "weight_decay": OPTIM["weight_decay"],
        "adam_beta1": beta1,
        "adam_beta2": beta2,
        "max_grad_norm": OPTIM["clip"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "bf16": job["precision"] == "bf16",
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
    }


def trl(job: dict[str, Any], student: Any, teacher: Any, prompts: list[list[int]], folder: Path) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    from potstill.data.batches import Order

    clock, tokens, losses = Clock(job["steps"]), [], []

    class Observed(DistillationTrainer):
        def _tokenize_prompts(self, prompts: list[str]) -> Any:
            return [by_name[name] for name in prompts], None, {}

        def compute_loss(self, model: Any, inputs: Any, *words: Any, **named: Any) -> Any:
            tokens.append(int(inputs["completion_mask"].sum()))
            loss = super().compute_loss(model, inputs, *words, **named)
            losses.append(float(loss))
            return loss

    class Watched(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            clock.after(state.global_step)

    logging.disable(logging.WARNING)
    order = Order(len(prompts), job["batch_size"], SEED)
    rows = [row for step in range(job["steps"]) for row in order.step(step)]
    by_name = {str(n): prompts[row] for n, row in enumerate(rows)}
    config = DistillationConfig(
        beta=1.0,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        **steps_of(job, student, folder),
    )
    trainer = Observed(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": name} for name in by_name]),
        processing_class=AutoTokenizer.from_pretrained(job["tokenizer"], padding_side="left"),
        callbacks=[Watched()],
    )
    clock.start()
    trainer.train()
    return {**clock.found, "tokens": sum(tokens), "learned": sum(tokens), "divergence": losses[0]}


def report(rounds: list[dict[str, Any]], engines: list[str], checked: str, title: str) -> dict[str, Any]:
    """Print the table; the same in numbers.

    Args:
        checked: the figure of each run by which a reader sees that both did the same; its `title` in the table.
    """
    per_token = {engine: [1e3 * turn[engine]["seconds"] / turn[engine]["tokens"] for turn in rounds] for engine in engines}
    sizes = {engine: [turn[engine]["bytes"] for turn in rounds] for engine in engines}
    peers = [engine for engine in engines if engine != OWN and OWN in engines]
    faster = {peer: [theirs / mine for theirs, mine in zip(per_token[peer], per_token[OWN], strict=True)] for peer in peers}
    smaller = {peer: [mine / theirs for theirs, mine in zip(sizes[peer], sizes[OWN], strict=True)] for peer in peers}
    table(
        [
            "engine",
            "ms per generated token",
            "generated tokens",
            "learned",
            title,
            "GB above the models",
            "potstill is faster by",
        ],
        [
            [
                engine,
                shown(per_token[engine]),
                *(" ".join(f"{turn[engine][count]:,}" for turn in rounds) for count in ("tokens", "learned")),
                " ".join(f"{turn[engine][checked]:.3f}" for turn in rounds),
                shown([size / 1e9 for size in sizes[engine]]),
                f"{shown(faster[engine], 1)}× at {shown(smaller[engine], 3)} of its memory" if engine in peers else "",
            ]
            for engine in engines
        ],
    )
    return {
        "ms_per_token": {engine: spread(values) for engine, values in per_token.items()},
        "bytes": {engine: spread(values) for engine, values in sizes.items()},
        **{count: {engine: [turn[engine][count] for turn in rounds] for engine in engines} for count in ("tokens", "learned")},
        "speedup": {peer: spread(values) for peer, values in faster.items()},
        "memory_ratio": {peer: spread(values) for peer, values in smaller.items()},
    }


def compare(
    doc: str | None,
    file: str,
    measure: Callable[[dict[str, Any]], dict[str, Any]],
    names: Sequence[str],
    checked: str,
    title: str,
) -> None:
    """A benchmark's command line: potstill against TRL over some steps; see `report`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small shape, two rounds")
    parser.add_argument("--shape", choices=RUNS, default="quick", help="real: SmolLM2; tiny: for tests")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="JSON lines: instruction, response, context; default: primer")
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps that are timed together")
    parser.add_argument("--batch-size", type=int, help="answers of a step; default: by shape")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer; default: by shape")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast over fp32 weights")
    parser.add_argument("--engines", nargs="+", choices=names, default=list(names[:2]))
    add_output(parser)
    words = parser.parse_args()
    if words.one:
        print(json.dumps(measure(json.loads(words.one))))
        return
    shape, run = words.shape, RUNS[words.shape]
    where = model_of(shape)
    missing = left_out({"trl": "trl"})
    engines = [engine for engine in words.engines if engine == OWN or not missing]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), words.rows, shape_of(shape)["vocab"], run, where)
        job = {
            "shape": shape,
            "folder": folder,
            "tokenizer": f"{folder}/tokenizer",
            "steps": words.steps,
            "batch_size": words.batch_size or run.batch_size,
            "max_new_tokens": words.max_new_tokens or NEW[shape],
            "precision": words.precision,
        }
        one = runner(file, measure, words.here)
        rounds = in_turn(engines, words.rounds or 2, lambda engine: one({**job, "engine": engine}))
    found = {**job, **report(rounds, engines, checked, title), **facts()}
    hand_over({name: value for name, value in found.items() if name not in ("folder", "tokenizer")}, rounds, words)


if __name__ == "__main__":
    compare(__doc__, __file__, measure, ENGINES, "divergence", "first step's divergence")
