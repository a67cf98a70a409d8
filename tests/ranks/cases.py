"""Small trainings that one process and several must end alike; run by torchrun as a script, `cases.py JOB FOLDER`.

In float64, where one process and two differ by rounding alone, eight digits below what a wrong normaliser does.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny_parts import gpt2_tokenizer, rows, tiny_model

from potstill.core.errors import Interrupted, UserError
from potstill.core.progress import Mode, Progress
from potstill.core.types import Example
from potstill.data.batches import StepRow
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, TokenStore, instruction_pairs
from potstill.divergences.forward_kl import ForwardKL
from potstill.edges import ranks
from potstill.edges.families import Logits
from potstill.losses.cross_entropy import CrossEntropy
from potstill.losses.distillation import Distillation
from potstill.losses.head import Loss
from potstill.recipe.parse import load_recipe
from potstill.run.runner import run_recipe
from potstill.teachers.cache import RowCache
from potstill.teachers.signals import Cached, HiddenForm, Live, TopKForm
from potstill.train import loop, team
from potstill.train.loop import Optim, fit
from potstill.train.team import Sharded, full_model, shard_frozen, shares
from potstill.train.work import CheckpointRules, Work

ROWS = 29  # seven steps of four and one of a single row: fewer than processes
TRAINING = Optim(epochs=1, batch_size=4, lr=1e-3, micro_batch_tokens=60, clip=0.5)
CASES = (
    "sft-qwen2",
    "sft-gpt2",
    "sft-untied",
    "kd",
    "kd-sharded-teacher",
    "kd-cached",
    "kd-cached-sharded",
    "kd-cached-idle",
    "kd-cached-topk-idle",
    "wide-batches",
    "reduced-each",
    "recomputed",
)


def student(family: str = "qwen2", **more: Any) -> Any:
    return tiny_model(family, 300, **more).double()


def objective(case: str, folder: Path) -> Any:
    if not case.startswith("kd"):
        return CrossEntropy()
    teacher = tiny_model("qwen2", 300, width=64, seed=7).double().requires_grad_(False)
    teacher = shard_frozen(teacher) if "sharded" in case else teacher
    signal: Any = Live(teacher)
    if "cached" in case:  # each process writes its rows, and in the second epoch reads those of the other
        head = teacher.get_output_embeddings()
        form = TopKForm(head, Logits(), 300, 2.0, 300) if "topk" in case else HiddenForm(head, Logits())
        ranks.on_first(lambda: RowCache(folder / "said", {}, form.width).close())
        cache = RowCache(folder / "said", {}, form.width)
        alone = (lambda lacking: any(ranks.gathered(lacking))) if "sharded" in case else (lambda lacking: lacking)
        signal = Cached(cache, form, lambda: teacher, (), alone)
    return Distillation(signal, ForwardKL(), 0.5, 2.0, 300)


def made_store(folder: Path) -> TokenStore:
    examples = [Example(str(i), row["instruction"], row["response"]) for i, row in enumerate(rows(ROWS))]
    pairs = instruction_pairs(examples, Renderer(gpt2_tokenizer(300), Prompts(format="alpaca")), Counts())
    return TokenStore.write(folder, pairs, Counts(), "here")


class RankMeans(Sharded):
    """Wrong: each process divides by its own tokens, and the means are averaged."""

    def batches(self, rows: Sequence[StepRow], max_tokens: int) -> Any:
        own = shares([len(row) for row in rows], ranks.world())[ranks.rank()]
        here, everywhere = sum(len(rows[i].response) for i in own), sum(len(row.response) for row in rows)
        self.scale = everywhere / (ranks.world() * max(1, here))
        yield from super().batches(rows, max_tokens)

    def loss(self, batch: Any) -> Loss:
        loss = super().loss(batch)
        return Loss(loss.total * self.scale, loss.parts)


class Stopping:
    """Asks for a stop at one step, in one process."""

    def __init__(self, at: int, rank: int = 0) -> None:
        self.at, self.rank, self.calls = at, rank, 0

    def __call__(self) -> bool:
        self.calls += 1
        return ranks.rank() == self.rank and self.calls == self.at


def trained(
    case: str, store: TokenStore, folder: Path, stop: int | None = None, said: Mode = "quiet", **optim: Any
) -> dict[str, Any] | None:
    """Train, or train until a stop; the figures and all weights, in the first process."""
    family = "gpt2" if case.endswith("gpt2") else "qwen2"
    dry = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if family == "gpt2" else {}
    model = student(family, **dry, **({"tie_word_embeddings": False} if "untied" in case else {}))
    if "cached" in case:
        optim = {"epochs": 2} | optim
    if "idle" in case:  # one of two processes has nothing to do in every step
        optim = {"batch_size": 1, "steps": 40} | optim
    if "wide" in case:
        optim = {"micro_batch_tokens": 10_000, "batch_size": 10} | optim
    if "recomputed" in case:
        optim = {"activation_checkpointing": True} | optim
    team.WHOLE_GRADIENTS_BYTES = 0 if "reduced" in case else 4 << 30
    if "bf16" in case:
        model, optim = model.float(), {"precision": "bf16"} | optim
    rules = CheckpointRules(every_steps=4)
    # the stop is asked for in the last process: all must agree on it
    work = Work(folder, case, Progress(said), checkpoint=rules, stop_requested=Stopping(stop or 0, ranks.world() - 1))
    try:
        fit(model, store, objective(case, folder), Optim(**(TRAINING.model_dump() | optim)), work, seed=1)
    except Interrupted:
        assert stop
        return None
    assert not stop
    with full_model(model) as plain:
        if plain is None:
            return None
        return {"figures": work.metrics.read(), "weights": {name: p.detach().clone() for name, p in plain.state_dict().items()}}


def agreement(folder: Path) -> None:
    """Every case, the broken one, and both halves of changing the number of processes."""
    store = TokenStore(folder / "tokens", Counts(rows=ROWS))
    results = {case: trained(case, store, folder / f"two-{case}") for case in CASES}
    results["one, then two"] = trained("kd", store, folder / "one-then-two")
    trained("kd", store, folder / "two-then-one", stop=5)
    trained("kd", store, folder / "two-then-two", stop=5)
    results["two, then two"] = trained("kd", store, folder / "two-then-two")
    results["bf16"] = trained("sft-bf16", store, folder / "two-bf16")
    right, loop.team_of = loop.team_of, RankMeans
    results["broken"] = trained("sft-qwen2", store, folder / "broken")
    loop.team_of = right
    run_recipe(load_recipe(folder / "two.toml"), folder / "straight")
    if ranks.first():
        torch.save(results, folder / "results.pt")


class OneFails(CrossEntropy):
    calls = 0

    def __call__(self, model: Any, batch: Any) -> Loss:
        self.calls += 1
        if ranks.rank() == 1 and self.calls == 5:
            raise UserError("only here: a row is wrong; mend it")
        return super().__call__(model, batch)


def one_fails(folder: Path) -> None:
    store = TokenStore(folder / "tokens", Counts(rows=ROWS))
    fit(student(), store, OneFails(), TRAINING, Work(folder / "fails", "fails"), seed=1)


def main(job: str, folder: str) -> None:
    from potstill.cli import guarded

    torch.set_num_threads(1)

    def work() -> None:
        with ranks.joined():
            {"agreement": agreement, "one_fails": one_fails}[job](Path(folder))

    guarded(work)()


if __name__ == "__main__":
    main(*sys.argv[1:])
