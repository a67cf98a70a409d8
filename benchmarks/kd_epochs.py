"""A whole distillation run of one and of ten epochs on instruction rows: potstill and its teacher cache against TRL.

    python benchmarks/kd_epochs.py --quick                              # about three minutes on two cores
    python benchmarks/kd_epochs.py --rows dolly.jsonl --shape cpu       # columns instruction, response, context
    python benchmarks/kd_epochs.py --rows dolly.jsonl --shape gpu --precision bf16
    POTSTILL_REAL_MODELS=.models python benchmarks/kd_epochs.py --rows dolly.jsonl --shape real --epochs 1 5   # SmolLM2

Each engine runs in a process of its own, in turn, `--rounds` times; ratios are taken round by round. All see the same token
ids, labels, weights, optimiser settings and batches; but for `trl-by-length`, in the same order, so that the mean loss of
every epoch is compared before any time is shown. The learning rate is constant, so the first epoch of a long run is a run
of one epoch: each engine runs the largest of `--epochs` once, and the clock is read where the shorter ones end. The clock
starts after models, rows and trainer are loaded, and before a cache exists: the teacher's first reading of the rows, and
every write to and read from the cache, count. Real tokens are those of prompts and responses, without padding.

Engines: `hidden` is potstill's `fit` as the distill stage runs it, the teacher's hidden states cached in bfloat16; `topk`
caches its 64 most probable tokens (of a teacher with random weights they hold little, so this loss is far smaller than the
others'); `live` caches nothing. `trl` is TRL's GKDTrainer on given responses (lmbda = 0) with forward KL (beta = 0),
without evaluation, checkpoints or logging, and without the gradient checkpointing that is its default. `trl-by-length` lets
it group rows of like length, the one setting that spares it padding, once an epoch has eight batches. GKDTrainer packs
nothing: its collator pads every batch, and it passes no positions to the model. Its use_liger_kernel, on with a GPU,
replaces layers by Triton kernels, which a CPU cannot run; its GKD loss uses nothing of Liger's and works on full logits.
TRL's own chunked loss belongs to DistillationTrainer, which generates every response itself and cannot be given any.
"""

import argparse
import importlib.util
import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from _bench import Memory, add_output, facts, hand_over, in_turn, left_out, runner, shown, spread, table
from _models import SHAPES, build, model_of


class Run(NamedTuple):
    """Rows of an epoch, rows of a batch, and the longest row in tokens."""

    count: int
    batch_size: int
    max_tokens: int


TINY = {"vocab": 2_048, "student": (64, 1), "teacher": (128, 1)}
RUNS = {
    "tiny": Run(8, 4, 64),
    "quick": Run(12, 4, 256),
    "cpu": Run(16, 8, 512),
    "gpu": Run(2_048, 8, 512),
    "real": Run(32, 16, 256),
}
OURS, PEERS = ("hidden", "topk", "live"), ("trl", "trl-by-length")
OPTIM = {"lr": 1e-4, "weight_decay": 0.01, "betas": (0.9, 0.999), "clip": 1.0}
GROUPS_FROM = 8  # batches in an epoch: with fewer, the Trainer groups within a single batch
TOKENIZER_ROWS = 2_000  # rows that the tokenizer is made from: all of them would take longer than the quick runs
SEED = 0


def shape_of(name: str) -> dict[str, Any]:
    return {"tiny": TINY, **SHAPES}[name]


def prepare(folder: Path, path: Path | None, vocab: int, run: Run, where: str | None = None) -> dict[str, int]:
    """Tokenizer and token ids of the first rows that fit, for every engine to read; how many tokens they are.

    Args:
        where: the model whose tokenizer it is; default: one made from the rows.
    """
    from potstill.data.prompts import Prompts, Renderer
    from potstill.data.store import Counts, instruction_pairs
    from potstill.edges.bpe import train_tokenizer
    from potstill.edges.vocabulary import load_tokenizer
    from potstill.sources.jsonl import Jsonl
    from potstill.sources.primer import Primer

    source = Jsonl(path=str(path), context="context") if path else Primer()
    examples = list(source.examples("train", Counter()))
    texts = (text for row in examples[:TOKENIZER_ROWS] for text in (row.instruction, row.context, row.response))
    tokenizer = load_tokenizer(where) if where else train_tokenizer(texts, min(vocab, 32_768))
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    prompts = Prompts(max_tokens=run.max_tokens, max_prompt_tokens=run.max_tokens // 2)
    pairs = list(islice(instruction_pairs(examples, Renderer(tokenizer, prompts), Counts()), run.count))
    if len(pairs) < run.count:
        raise SystemExit(f"{path or 'the primer'}: {len(pairs):,} rows fit into {run.max_tokens} tokens; lower --count")
    (folder / "rows.json").write_text(json.dumps(pairs))
    responses = sum(len(response) for _, response in pairs)
    return {"rows": len(pairs), "tokens": sum(len(prompt) for prompt, _ in pairs) + responses, "response_tokens": responses}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """In this process: mean loss of every epoch; seconds, peak bytes above the loaded models at the end of those asked for."""
    import torch

    engine, folder, bf16 = job["engine"], Path(job["folder"]), job["precision"] == "bf16"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = shape_of(job["shape"])
    student = build(shape, "student", 1).to(device)
    teacher = build(shape, "teacher", 2).to(device, torch.bfloat16 if bf16 else torch.float32)
    teacher.eval().requires_grad_(False)
    pairs = json.loads((folder / "rows.json").read_text())
    steps = len(pairs) // job["batch_size"]
    marks = Marks({epoch * steps for epoch in job["epochs"]})
    with tempfile.TemporaryDirectory() as work:
        losses, told = (ours if engine in OURS else trl)(job, student, teacher, pairs, Path(work), marks)
    means = [sum(losses[n : n + steps]) / steps for n in range(0, len(losses), steps)]
    at = {str(epoch): marks.found[epoch * steps] for epoch in job["epochs"]}
    return {"losses": means, "at": at, **told}


class Marks:
    """The clock and the peak of memory, read after some steps."""

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.found = steps, {}

    def start(self) -> None:
        self._memory, self._begun = Memory(), time.perf_counter()

    def after(self, step: int) -> None:
        import torch

        if step in self.steps:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.found[step] = {"seconds": time.perf_counter() - self._begun, "bytes": self._memory.above()}


def ours(
    job: dict[str, Any], student: Any, teacher: Any, pairs: list[Any], folder: Path, marks: Marks
) -> tuple[list[float], dict[str, Any]]:
    """potstill's loop; loss of each step, and what the teacher's signal says of itself."""
    from potstill.core.progress import Progress
    from potstill.data.store import Counts, TokenStore
    from potstill.divergences.forward_kl import ForwardKL
    from potstill.edges.families import logits_of
    from potstill.losses.distillation import Distillation
    from potstill.teachers.cache import RowCache, keys_of
    from potstill.teachers.signals import Cached, HiddenForm, Live, TopKForm
    from potstill.train.loop import Optim, fit
    from potstill.train.work import Work

    class Watched(Progress):
        def update(self, done: int, total: int, what: str = "step", start: int = 0, **figures: str) -> None:
            marks.after(done)

    vocab = student.config.vocab_size
    optim = Optim(
        **OPTIM,
        schedule="constant",
        epochs=max(job["epochs"]),
        batch_size=job["batch_size"],
        precision=job["precision"],
    )
    work = Work(folder / "work", "kd", progress=Watched("quiet"))
    store = TokenStore.write(work.folder / "tokens", pairs, Counts(), "rows")
    marks.start()
    if job["engine"] == "live":
        signal = Live(teacher)
    else:
        head, made = teacher.get_output_embeddings(), logits_of(teacher.config)
        form = HiddenForm(head, made) if job["engine"] == "hidden" else TopKForm(head, made, 64, 1.0, vocab)
        cache = RowCache(folder / "cache", {"signal": form.name}, form.width)
        signal = Cached(cache, form, lambda: teacher, cache.missing(keys_of(store)))
    fit(student, store, Distillation(signal, ForwardKL(), 1.0, 1.0, vocab), optim, work, seed=SEED)
    return [line["loss"] for line in work.metrics.read()], {"cache_bytes": signal.facts().get("bytes", 0)}


def trl(
    job: dict[str, Any], student: Any, teacher: Any, pairs: list[Any], folder: Path, marks: Marks
) -> tuple[list[float], dict[str, Any]]:
    """TRL's trainer; loss of each step."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from potstill.data.batches import Order

    class InOrder(torch.utils.data.Sampler[int]):
        """The rows as potstill's loop takes them."""

        def __init__(self) -> None:
            self.epoch, self.order = -1, Order(len(pairs), len(pairs), SEED)

        def __iter__(self) -> Iterator[int]:
            self.epoch += 1
            return iter(self.order.step(self.epoch))

        def __len__(self) -> int:
            return len(pairs)

    steps = len(pairs) // job["batch_size"]
    losses = torch.zeros(max(job["epochs"]) * steps, device=student.device)  # one tensor: many small ones fragment memory

    class Observed(GKDTrainer):
        def compute_loss(self, *words: Any, **named: Any) -> Any:
            loss = super().compute_loss(*words, **named)
            losses[self.state.global_step] = loss.detach()
            return loss

        def _get_train_sampler(self, *words: Any, **named: Any) -> Any:
            return InOrder() if job["engine"] == "trl" else super()._get_train_sampler(*words, **named)

    class Watched(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            marks.after(state.global_step)

    logging.disable(logging.WARNING)
    on_gpu = student.device.type == "cuda"
    student.config.use_cache = teacher.config.use_cache = False
    beta1, beta2 = OPTIM["betas"]
    config = GKDConfig(
        output_dir=str(folder),
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        num_train_epochs=max(job["epochs"]),
        per_device_train_batch_size=job["batch_size"],
        learning_rate=OPTIM["lr"],
        weight_decay=OPTIM["weight_decay"],
        adam_beta1=beta1,
        adam_beta2=beta2,
        max_grad_norm=OPTIM["clip"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        bf16=job["precision"] == "bf16",
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        use_liger_kernel=on_gpu and importlib.util.find_spec("liger_kernel") is not None,
        train_sampling_strategy="random" if job["engine"] == "trl" else "group_by_length",
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_length=None,
        seed=SEED,
    )
    rows = [
        {
            "prompt": "",  # the collator insists on a text, and takes the boundary from the mask
            "input_ids": [*prompt, *response],
            "completion_mask": [0] * len(prompt) + [1] * len(response),
            "length": len(prompt) + len(response),
        }
        for prompt, response in pairs
    ]
    trainer = Observed(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(str(Path(job["folder"]) / "tokenizer")),
        callbacks=[Watched()],
    )
    marks.start()
    trainer.train()
    return losses.tolist(), {"cache_bytes": 0}


def report(rounds: list[dict[str, Any]], engines: list[str], epochs: list[int], counts: dict[str, int]) -> dict[str, Any]:
    """Print the tables; the same in numbers."""
    losses = {engine: rounds[0][engine]["losses"] for engine in engines}
    base = "live" if "live" in engines else engines[0]
    gaps = {
        engine: max(abs(theirs / own - 1) for theirs, own in zip(losses[engine], losses[base], strict=True))
        for engine in engines
        if engine != base
    }
    tokens, learned = f"{counts['tokens']:,} real tokens an epoch", f"{counts['response_tokens']:,} of them response"
    print(f"\n{counts['rows']:,} rows: {tokens}, {learned}")
    table(
        ["engine", "mean loss of the first epoch", "of the last", f"largest gap of an epoch to {base}"],
        [[e, f"{losses[e][0]:.5f}", f"{losses[e][-1]:.5f}", f"{gaps[e]:.1e}" if e in gaps else ""] for e in engines],
    )
    found: dict[str, Any] = {"losses": losses, "loss_gap": gaps, "epochs": {}, "speedup": {}, "memory_ratio": {}}
    own, peers = ([engine for engine in engines if engine in group] for group in (OURS, PEERS))
    for epoch in map(str, epochs):
        seconds, sizes = (
            {engine: [turn[engine]["at"][epoch][what] for turn in rounds] for engine in engines}
            for what in ("seconds", "bytes")
        )
        rates = {engine: [counts["tokens"] * int(epoch) / value for value in seconds[engine]] for engine in engines}
        faster = {
            (e, p): [theirs / ours for theirs, ours in zip(seconds[p], seconds[e], strict=True)] for e in own for p in peers
        }
        memory = {(e, p): [ours / theirs for theirs, ours in zip(sizes[p], sizes[e], strict=True)] for e in own for p in peers}
        print(f"\n{epoch} epoch{'s' * (epoch != '1')}")
        table(
            [
                "engine",
                "s",
                "real tokens per s",
                "GB above the models",
                "MB of cache",
                *(f"times faster than {p}" for p in peers),
            ],
            [
                [
                    engine,
                    shown(seconds[engine]),
                    shown(rates[engine], 0),
                    shown([size / 1e9 for size in sizes[engine]]),
                    f"{rounds[0][engine]['cache_bytes'] / 1e6:,.1f}",
                    *(shown(faster[engine, peer], 1) if engine in own else "" for peer in peers),
                ]
                for engine in engines
            ],
        )
        found["epochs"][epoch] = {
            engine: {
                "seconds": spread(seconds[engine]),
                "tokens_per_s": spread(rates[engine]),
                "bytes": spread(sizes[engine]),
                "cache_bytes": rounds[0][engine]["cache_bytes"],
            }
            for engine in engines
        }
        for name, ratios in (("speedup", faster), ("memory_ratio", memory)):
            found[name][epoch] = {peer: {engine: spread(ratios[engine, peer]) for engine in own} for peer in peers}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small shape, few rows, two rounds")
    parser.add_argument("--shape", choices=RUNS, default="quick", help="sizes of the models, as in kd_step; tiny: for tests")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="JSON lines: instruction, response, context; default: primer")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 10], metavar="N")
    parser.add_argument("--count", type=int, help="rows of an epoch, a multiple of the batch size; default: by shape")
    parser.add_argument("--batch-size", type=int, help="rows of an optimiser step; default: by shape")
    parser.add_argument("--max-tokens", type=int, help="longer rows are left out; default: by shape")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast over fp32 weights")
    parser.add_argument("--engines", nargs="+", choices=(*OURS, *PEERS), help="default: all that differ with so many rows")
    add_output(parser)
    words = parser.parse_args()
    if words.one:
        print(json.dumps(measure(json.loads(words.one))))
        return
    given = {name: value for name in Run._fields if (value := getattr(words, name)) is not None}
    run = RUNS[words.shape]._replace(**given)
    epochs = sorted(set(words.epochs))
    if epochs[0] < 1 or run.count % run.batch_size:
        parser.error("--epochs must be 1 or more, and --count a multiple of the batch size: then every epoch ends with a step")
    where = model_of(words.shape)
    missing = left_out(dict.fromkeys(PEERS, "trl"))
    few = run.count // run.batch_size < GROUPS_FROM
    engines = words.engines or [engine for engine in (*OURS, *PEERS) if not (few and engine == "trl-by-length")]
    engines = [engine for engine in engines if engine not in missing]
    with tempfile.TemporaryDirectory() as folder:
        counts = prepare(Path(folder), words.rows, shape_of(words.shape)["vocab"], run, where)
        common = {"folder": folder, "shape": words.shape, "epochs": epochs, "batch_size": run.batch_size}
        job = {**common, "precision": words.precision}
        one = runner(__file__, measure, words.here)
        rounds = in_turn(engines, words.rounds or (2 if words.quick else 3), lambda engine: one({**job, "engine": engine}))
    setting = {"shape": words.shape, "precision": words.precision, **run._asdict(), **counts}
    found = {**setting, **report(rounds, engines, epochs, counts), **facts()}
    hand_over(found, rounds, words)


if __name__ == "__main__":
    main()
