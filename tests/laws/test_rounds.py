"""Rounds of samples: judged once, learned in several steps, two means in one loss, the same bits after an interruption."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_parts import chat_tokenizer, rows, tiny_model

from potstill.core.errors import Interrupted, UserError
from potstill.core.types import Example
from potstill.data.batches import StepRow, pack_rows, rows_of
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, TokenStore, weighted_pairs
from potstill.edges.decoding import undisturbed
from potstill.losses.cross_entropy import CrossEntropy
from potstill.losses.minillm import Estimator, MiniLLM, judged
from potstill.rollouts.local import Local
from potstill.rollouts.mixed import Mixed
from potstill.teachers import signals
from potstill.teachers.signals import Live, Recalled
from potstill.train.loop import Optim, fit
from potstill.train.rounds import Rounds, RoundSamples
from potstill.train.work import CheckpointRules, Work

SEED, NEW = 7, 10
DROPOUT: dict[str, Any] = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chat_tokenizer()


@pytest.fixture(scope="module")
def store(tokenizer: Any, tmp_path_factory: Any) -> TokenStore:
    """Rows of weights 1, 2 and 3."""
    examples = [
        Example(str(i), row["instruction"], row["response"], row["context"], weight=1.0 + i % 3)
        for i, row in enumerate(rows(21))
    ]
    pairs = weighted_pairs(examples, Renderer(tokenizer, Prompts()), Counts())
    return TokenStore.write(tmp_path_factory.mktemp("store"), pairs, Counts(), "here")


def student_of(tokenizer: Any, **more: Any) -> Any:
    return tiny_model("gpt2", len(tokenizer), seed=0, std=0.1, **(DROPOUT | more))


class Run:
    """One training by rounds; `figures` of each step."""

    def __init__(self, tokenizer: Any, store: TokenStore, folder: Path, **more: Any) -> None:
        self.model = student_of(tokenizer).to(more.pop("dtype", torch.float32))
        dtype = next(self.model.parameters()).dtype
        self.teacher = tiny_model("qwen2", len(tokenizer), seed=9, std=0.1).to(dtype).requires_grad_(False)
        self.optim = Optim.model_validate(
            {"lr": 3e-3, "steps": 4, "batch_size": 6, "precision": "fp32"} | more.pop("optim", {})
        )
        recalled = more.pop("recalled", False)
        self.estimator, dropout = Estimator(**more.pop("estimator", {})), more.pop("dropout", False)
        text, stop_at, every = more.pop("text", 0.5), more.pop("stop_at", None), more.pop("checkpoint", None)
        self.samples = RoundSamples.model_validate({"max_new_tokens": NEW, "updates": 3} | more)
        self.vocab, self.stops = len(tokenizer), list(range(0, len(tokenizer), 10))
        self.signal = Recalled(Live(self.teacher)) if recalled else Live(self.teacher)
        self.objective = MiniLLM(self.signal, self.estimator, self.vocab)
        self.seen: list[list[StepRow]] = []

        def judge(drawn: Any) -> Any:
            self.seen.append(list(drawn))
            if isinstance(self.signal, Recalled):
                self.signal.forget()
            with undisturbed(self.model):
                told = judged(self.model, self.signal, drawn, self.estimator, self.vocab, self.optim.pass_tokens(64))
            return told.rows, told.figures

        engine: Any = Mixed(self.model, self.teacher, tokenizer, self.stops, self.estimator.alpha, self.vocab)
        if self.estimator.alpha == 0:
            engine = Local(self.model, tokenizer, self.stops, vocab=self.vocab)
        self.rounds = Rounds(store, self.optim, self.samples, text, engine, judge, SEED, lambda done, total: None)
        work = Work(folder, "here", checkpoint=CheckpointRules(every_steps=every))
        if stop_at is not None:
            work.stop_requested = lambda: len(lines(folder)) >= stop_at
        self.totals = fit(self.model, store, self.objective, self.optim, work, seed=SEED, lessons=self.rounds, dropout=dropout)
        self.figures = lines(folder)


def lines(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_the_teacher_reads_a_rounds_answers_once_and_all_ends_with_the_same_bits(
    store: TokenStore, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[int]()
    hidden = signals.teacher_hidden
    monkeypatch.setattr(signals, "teacher_hidden", lambda *both: read.append(both[1].sampled) or hidden(*both))
    ends = {}
    for recalled in (False, True):
        read.clear()
        optim = {"micro_batch_tokens": 60, "steps": 6}
        run = Run(tokenizer, store, tmp_path / str(recalled), recalled=recalled, optim=optim, updates=3, per_prompt=2)
        ends[recalled] = (sum(read), [*run.model.state_dict().values()], run.figures)
    passes, again = ends[False][0], ends[True][0]
    assert again * 4 == passes  # judged, and three updates
    assert again > 2  # some passes a round
    assert all(torch.equal(a, b) for a, b in zip(ends[False][1], ends[True][1], strict=True))
    assert ends[False][2] == ends[True][2]


def test_a_steps_loss_is_two_means(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    """That of the samples, as they were judged, and λ times that of the rows of data, by rows' weights."""
    run = Run(tokenizer, store, tmp_path, dtype=torch.float64, optim={"steps": 1})
    (found,), model = run.figures, student_of(tokenizer).double()
    numbers = run.rounds.rows(0)
    assert len(numbers) == 12
    (drawn,) = run.seen
    assert [(list(row.prompt), row.weight) for row in drawn] == [
        ([int(i) for i in store[n][0]], store.weight(n)) for n in numbers[:6]
    ]
    told = judged(model, Live(run.teacher), drawn, run.estimator, run.vocab, run.optim.pass_tokens(64))
    text = rows_of(store, numbers[6:])
    means = []
    for objective, own in ((run.objective, told.rows), (CrossEntropy(), text)):
        total = objective(model, pack_rows(own)).total
        means.append(total / sum(row.weight * len(row.response) for row in own))
    loss = means[0] + 0.5 * means[1]
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)  # what is judged is kept in float32
    assert found["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert found["ce"] == pytest.approx(means[1].item(), rel=1e-9)
    assert found["samples_reward"] == pytest.approx(told.figures["reward"], rel=1e-9)
    assert found["samples_gap"] < 1e-5
    assert found["samples_length"] == sum(len(row.response) for row in drawn) / 6
    assert run.totals.generated_tokens == run.totals.sampled_tokens == sum(len(row.response) for row in drawn)


def test_a_round_is_drawn_once_and_read_beside_new_rows(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    run = Run(tokenizer, store, tmp_path, optim={"steps": 5}, estimator={"alpha": 0.0})
    assert [line["samples_age"] for line in run.figures] == [0, 1, 2, 0, 1]
    assert len(run.seen) == 2
    assert len({line["samples_reward"] for line in run.figures}) == 2
    assert [len(run.rounds.rows(step)) for step in range(5)] == [12, 6, 6, 12, 6]
    lengths = [sum(len(row.response) for row in drawn) for drawn in run.seen]
    assert run.totals.generated_tokens == sum(lengths)
    assert run.totals.sampled_tokens == 3 * lengths[0] + 2 * lengths[1]
    assert run.totals.rows == 2 * 6 + 5 * 6


@pytest.mark.parametrize("dropout, per_prompt", [(False, 1), (False, 3), (True, 1)])
def test_the_first_ratios_are_1_and_only_without_dropout(
    dropout: bool, per_prompt: int, store: TokenStore, tokenizer: Any, tmp_path: Path
) -> None:
    """Then the whitened returns sum to 0, and nothing is clipped."""
    run = Run(tokenizer, store, tmp_path, estimator={"alpha": 0.0}, dropout=dropout, per_prompt=per_prompt)
    first, later = run.figures[0], run.figures[1]
    exact = abs(first["samples_long_term"]) < 1e-5 and first["samples_clipped"] == 0
    assert exact is not dropout
    assert abs(later["samples_long_term"]) > 1e-5


@pytest.mark.parametrize("text", [0.0, 2.0])
@pytest.mark.parametrize("per_prompt", [1, 3])
def test_an_epoch_takes_every_row_once(text: float, per_prompt: int, store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    """As a prompt or as it is; the last round is short."""
    run = Run(tokenizer, store, tmp_path, text=text, per_prompt=per_prompt, updates=2, optim={"steps": None, "epochs": 2})
    taken = Counter(n for step in range(run.totals.steps) for n in run.rounds.rows(step))
    assert taken == Counter(2 * list(range(len(store))))
    assert (run.totals.rows, run.totals.epochs) == (2 * len(store), 2.0)
    assert all(len(drawn) % per_prompt == 0 for drawn in run.seen)
    assert ("ce" in run.figures[0]) is (text > 0)


def test_micro_batches_change_nothing(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    one, many = (
        Run(tokenizer, store, tmp_path / str(size), dtype=torch.float64, optim={"micro_batch_tokens": size})
        for size in (1, 10_000)
    )
    for a, b in zip(one.figures, many.figures, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("at, per_prompt", [(1, 1), (2, 1), (3, 1), (2, 3)])
def test_stopped_in_the_middle_of_a_round_it_ends_the_same(
    at: int, per_prompt: int, store: TokenStore, tokenizer: Any, tmp_path: Path
) -> None:
    """The student that drew the answers is no more: answers, weights and returns lie in the checkpoint."""
    more: dict[str, Any] = {"optim": {"steps": 5, "micro_batch_tokens": 150}, "per_prompt": per_prompt}
    whole = Run(tokenizer, store, tmp_path / "whole", **more)
    with pytest.raises(Interrupted):
        Run(tokenizer, store, tmp_path / "parts", checkpoint=1, stop_at=at, **more)
    again = Run(tokenizer, store, tmp_path / "parts", **more)
    assert again.figures == whole.figures
    assert again.totals.tokens == whole.totals.tokens
    assert again.totals.generated_tokens == whole.totals.generated_tokens
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_law_rejects_a_checkpoint_that_forgets_the_round(
    store: TokenStore, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Run(tokenizer, store, tmp_path / "whole")
    with pytest.raises(Interrupted):
        Run(tokenizer, store, tmp_path / "parts", checkpoint=1, stop_at=1)
    monkeypatch.setattr(Rounds, "restore", lambda self, state: None)
    assert Run(tokenizer, store, tmp_path / "parts").figures != whole.figures


def test_cut_answers_can_be_left_out(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    few: dict[str, Any] = {"max_new_tokens": 3, "optim": {"steps": 1}}
    counted, masked = (Run(tokenizer, store, tmp_path / cut, cut=cut, **few) for cut in ("counted", "masked"))
    assert counted.figures[0]["samples_cut"] == masked.figures[0]["samples_cut"] > 0
    lost = round(masked.figures[0]["samples_cut"] * 6) * 3
    assert masked.totals.sampled_tokens == counted.totals.sampled_tokens - lost
    assert masked.totals.generated_tokens == counted.totals.generated_tokens


def test_nothing_but_cut_answers_teaches_nothing(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 5: every answer of 3 rounds was cut at samples.max_new_tokens = 1"):
        Run(tokenizer, store, tmp_path, cut="masked", max_new_tokens=1, updates=2, optim={"batch_size": 1, "steps": 8})


def test_a_gap_between_drawing_and_judging_is_refused(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"step 1: log-probabilities of the sampled tokens differ by .* samples.max_gap = 1e-12"
    ):
        Run(tokenizer, store, tmp_path, max_gap=1e-12)
