"""On-policy steps: what the student wrote is what it learns from, each token once, and the data beside it are as ever."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_parts import chat_tokenizer, rows, tiny_model
from torch import Tensor

from potstill.core.errors import Interrupted, UserError
from potstill.core.types import Example
from potstill.data import batches
from potstill.data.prompts import Prompts, Renderer
from potstill.data.rollout import Asked, Sampling
from potstill.data.store import Counts, TokenStore, instruction_pairs
from potstill.divergences.forward_kl import ForwardKL
from potstill.divergences.reverse_kl import ReverseKL
from potstill.losses.distillation import Distillation, OnPolicy
from potstill.rollouts.local import Local
from potstill.teachers import signals
from potstill.teachers.signals import Live
from potstill.train import rounding
from potstill.train.loop import Optim, data_of, fit
from potstill.train.practice import Practice, Samples
from potstill.train.work import CheckpointRules, Work

SEED, NEW = 7, 12


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chat_tokenizer()


@pytest.fixture(scope="module")
def store(tokenizer: Any, tmp_path_factory: Any) -> TokenStore:
    examples = [Example(str(i), row["instruction"], row["response"], row["context"]) for i, row in enumerate(rows(21))]
    pairs = instruction_pairs(examples, Renderer(tokenizer, Prompts()), Counts())
    return TokenStore.write(tmp_path_factory.mktemp("store"), pairs, Counts(), "here")


def student_of(tokenizer: Any, **more: Any) -> Any:
    return tiny_model(more.pop("family", "qwen2"), len(tokenizer), seed=0, **more)


def stops(tokenizer: Any) -> list[int]:
    """One token in ten ends an answer, so that some end of themselves."""
    return list(range(0, len(tokenizer), 10))


class Run:
    """One training on samples; `figures` of each step."""

    def __init__(self, tokenizer: Any, store: TokenStore, folder: Path, model: Any = None, **more: Any) -> None:
        self.model = student_of(tokenizer).double() if model is None else model
        self.teacher = tiny_model("qwen2", len(tokenizer), seed=9).to(next(self.model.parameters()).dtype).eval()
        optim = {"lr": 1e-2, "steps": 4, "batch_size": 6, "precision": "fp32"} | more.pop("optim", {})
        every_steps, stop_at, vocab = more.pop("checkpoint", None), more.pop("stop_at", None), len(tokenizer)
        interruptible = more.pop("interruptible", None)
        self.samples = Samples(**({"max_new_tokens": NEW} | more))
        self.optim = Optim(**optim)
        self.engine = Local(self.model, tokenizer, stops(tokenizer), vocab=vocab)
        data = data_of(store, self.optim, SEED, self.samples.takes(self.optim.batch_size))
        self.practice = Practice(data, self.samples, self.engine, self.optim.batch_size, SEED, lambda done, total: None)
        live = Live(self.teacher)
        objective = OnPolicy(Distillation(live, ForwardKL(), 0.5, 1.0, vocab), Distillation(live, ReverseKL(), 1.0, 1.0, vocab))
        work = Work(folder, "here", checkpoint=CheckpointRules(every_steps=every_steps))
        work.interruptible = interruptible or work.interruptible
        if stop_at is not None:
            work.stop_requested = lambda: len(lines(folder)) >= stop_at
        self.totals = fit(self.model, store, objective, self.optim, work, seed=SEED, lessons=self.practice)
        self.figures = lines(folder)


def lines(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def divergence(model: Any, teacher: Any, prompt: Any, response: Any) -> Tensor:
    """KL(student ‖ teacher) at each token of a response, from transformers' logits."""
    ids = torch.tensor([[*map(int, prompt), *map(int, response)]])
    logq, logp = (m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (model, teacher))
    return (logq.exp() * (logq - logp)).sum(-1)


def test_the_first_step_is_the_reverse_kl_of_what_was_drawn(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    """No gradient through the drawing, every drawn token once, the token that ends an answer among them."""
    run = Run(tokenizer, store, tmp_path, optim={"steps": 1})
    model = student_of(tokenizer).double()
    chosen = data_of(store, run.optim, SEED).rows(0)
    prompts = [Asked(tuple(int(i) for i in store[row][0])) for row in chosen]
    drawn = Local(model, tokenizer, stops(tokenizer))(prompts, 1, Sampling(max_new_tokens=NEW), SEED << 32)
    per_token = torch.cat([divergence(model, run.teacher, prompts[each.prompt].ids, each.ids) for each in drawn])
    assert {each.finished for each in drawn} == {True, False}
    per_token.mean().backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    (found,) = run.figures
    assert found["loss"] == pytest.approx(per_token.mean().item(), rel=1e-9)
    assert found["grad_norm"] == pytest.approx(norm.item(), rel=1e-9)
    assert run.totals.sampled_tokens == run.totals.response_tokens == len(per_token)
    assert found["samples_length"] == len(per_token) / 6
    assert found["samples_cut"] == sum(not each.finished for each in drawn) / 6
    assert found["samples_gap"] < 1e-6  # log-probabilities are kept in float32


def test_data_beside_samples_are_weighed_by_their_tokens(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    run = Run(tokenizer, store, tmp_path, share=0.5, optim={"steps": 1})
    (found,), told = run.figures, run.totals.response_tokens - run.totals.sampled_tokens
    chosen = data_of(store, run.optim, SEED, run.samples.takes(6)).rows(0)
    assert told == sum(store.response_length(row) for row in chosen[3:])
    on_data = 0.5 * found["ce"] + 0.5 * found["divergence"]
    both = (told * on_data + run.totals.sampled_tokens * found["samples_divergence"]) / run.totals.response_tokens
    assert found["loss"] == pytest.approx(both, rel=1e-9)


def test_micro_batches_change_nothing(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    one, many = (
        Run(tokenizer, store, tmp_path / str(size), share=0.5, optim={"micro_batch_tokens": size}) for size in (1, 10_000)
    )
    for a, b in zip(one.figures, many.figures, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_a_short_last_step_still_writes(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    """21 rows in steps of 5: the share of the last one's single row rounds to nothing."""
    run = Run(tokenizer, store, tmp_path, share=0.5, optim={"steps": None, "epochs": 1, "batch_size": 5})
    assert [len(run.practice.rows(step)) for step in range(5)] == [5, 5, 5, 5, 1]
    assert run.figures[-1]["samples_length"] > 0


def test_groups_answer_fewer_prompts(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    run = Run(tokenizer, store, tmp_path, per_prompt=3, optim={"steps": 2})
    assert [len(run.practice.rows(step)) for step in (0, 1)] == [2, 2]
    assert run.totals.rows == 4


@pytest.mark.parametrize("size", [1, 90, 10_000])
def test_the_prompt_of_a_group_is_read_once_and_learned_as_if_it_were_not(
    size: int, store: TokenStore, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By student and teacher; what is counted as read is what is read."""
    runs, read, hidden = [], list[int](), signals.teacher_hidden
    monkeypatch.setattr(signals, "teacher_hidden", lambda *both: read.append(len(both[1].ids_T)) or hidden(*both))
    for least in (batches.LEAST_SAVED, 2.0):  # 2: nothing saves so much
        read.clear()
        monkeypatch.setattr(batches, "LEAST_SAVED", least)
        optim = {"steps": 3, "batch_size": 8, "micro_batch_tokens": size}
        run = Run(tokenizer, store, tmp_path / str(least), share=0.75, per_prompt=3, optim=optim)
        assert sum(read) == run.totals.tokens
        runs.append(run)
    once, whole = runs
    for a, b in zip(once.figures, whole.figures, strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6)  # the gap itself is rounding
    own = [int(row) for step in range(3) for row in once.practice.rows(step)[:2]]
    prompts = sum(store.length(row) - store.response_length(row) for row in own)
    saved = whole.totals.tokens - once.totals.tokens
    assert saved == {1: 0, 10_000: 2 * prompts}.get(size, saved)
    assert 0 < saved <= 2 * prompts or size == 1


@pytest.mark.parametrize("family", ["lfm2"])
def test_a_model_that_reads_rows_whole_is_counted_so(family: str, store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    recurrent = {"layer_types": ["full_attention", "conv"], "block_auto_adjust_ff_dim": False}
    model = student_of(tokenizer, family=family, **recurrent)
    run = Run(tokenizer, store, tmp_path, model=model, per_prompt=3, optim={"steps": 1})
    asked = run.practice.rows(0)
    prompts = sum(store.length(row) - store.response_length(row) for row in asked)
    assert run.totals.tokens == 3 * prompts + run.totals.sampled_tokens


def test_a_prompt_is_answered_otherwise_at_each_step(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    """By other random numbers, though the student is the same."""
    practice = Run(tokenizer, store, tmp_path, optim={"steps": 2, "batch_size": len(store)}).practice
    first, second = ({tuple(row.prompt): tuple(row.response) for row in practice(step)} for step in (0, 1))
    assert first.keys() == second.keys()
    assert sum(first[prompt] != second[prompt] for prompt in first) > len(store) / 2


def test_an_old_answer_says_how_old_it_is(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    run = Run(tokenizer, store, tmp_path, every=2)
    assert [line["samples_age"] for line in run.figures] == [0, 1, 0, 1]
    assert run.figures[1]["samples_gap"] > 1e-4 > run.figures[2]["samples_gap"]


@pytest.mark.parametrize("at, per_prompt", [(1, 1), (2, 1), (3, 1), (2, 3)])
def test_stopped_among_steps_that_were_written_for_together(
    at: int, per_prompt: int, store: TokenStore, tokenizer: Any, tmp_path: Path
) -> None:
    """The student that wrote them is no more: what it wrote lies in the checkpoint."""
    more: dict[str, Any] = {"every": 3, "per_prompt": per_prompt}
    whole = Run(tokenizer, store, tmp_path / "whole", model=student_of(tokenizer), **more)
    with pytest.raises(Interrupted):
        Run(tokenizer, store, tmp_path / "parts", model=student_of(tokenizer), checkpoint=1, stop_at=at, **more)
    again = Run(tokenizer, store, tmp_path / "parts", model=student_of(tokenizer), **more)
    assert again.figures == whole.figures
    assert again.totals.tokens == whole.totals.tokens
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_rows_that_pad_the_output_layer_make_no_gap(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    """They are never drawn, whatever the student's logits for them are."""
    padded = tiny_model("qwen2", len(tokenizer) + 200, seed=0)
    run = Run(tokenizer, store, tmp_path, model=padded, optim={"steps": 1})
    assert run.figures[0]["samples_gap"] < 1e-5


def test_stopped_in_a_validation_after_a_step_without_a_row_it_is_validated(
    store: TokenStore, tokenizer: Any, tmp_path: Path
) -> None:
    """Step 2 has a line in the curves, but no loss: that line is no validation."""

    def run(folder: Path, stop: bool) -> None:
        def validate(model: Any) -> dict[str, float]:
            asked = stop and len(lines(folder)) == 3  # the start's validation and two steps
            work.stop_requested = lambda: asked
            if asked:
                raise KeyboardInterrupt
            return {"validation_nll": 1.0}

        work = Work(folder, "here")
        model, optim = student_of(tokenizer), Optim(steps=2, batch_size=2, precision="fp32")
        samples = Samples(cut="masked", max_new_tokens=1)
        engine, live = Local(model, tokenizer, []), Live(tiny_model("qwen2", len(tokenizer), seed=9).eval())
        both = [Distillation(live, ReverseKL(), 1.0, 1.0, len(tokenizer)) for _ in range(2)]
        practice = Practice(data_of(store, optim, SEED), samples, engine, 2, SEED, lambda done, total: None)
        fit(model, store, OnPolicy(*both), optim, work, seed=SEED, validate=validate, validations=1, lessons=practice)

    run(tmp_path / "whole", stop=False)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", stop=True)
    run(tmp_path / "parts", stop=False)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_equal_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="per_prompt = 2 answers at temperature 0 would all be the same"):
        Samples(per_prompt=2, temperature=0)


def test_ctrl_c_cannot_come_while_weights_are_rounded(
    store: TokenStore, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing can be interrupted, and what is saved then are the weights: half of them would be rounded for good."""
    inside, seen, round_one = [False], list[bool](), rounding.round_by_chance

    @contextmanager
    def interruptible() -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    def watched(*given: Tensor) -> None:
        seen.append(inside[0])
        round_one(*given)

    monkeypatch.setattr(rounding, "round_by_chance", watched)
    model = student_of(tokenizer)
    Run(tokenizer, store, tmp_path, model=model, optim={"steps": 1, "precision": "bf16"}, interruptible=interruptible)
    assert len(seen) > 1
    assert not any(seen)


def test_cut_answers_can_be_left_out(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    counted, masked = (Run(tokenizer, store, tmp_path / cut, cut=cut, optim={"steps": 1}) for cut in ("counted", "masked"))
    assert counted.figures[0]["samples_cut"] == masked.figures[0]["samples_cut"] > 0
    lost = round(masked.figures[0]["samples_cut"] * 6) * NEW
    assert masked.totals.sampled_tokens == counted.totals.sampled_tokens - lost


def test_nothing_but_cut_answers_teaches_nothing(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 3: every answer of 3 steps was cut at samples.max_new_tokens = 1"):
        Run(tokenizer, store, tmp_path, cut="masked", max_new_tokens=1, optim={"batch_size": 1, "steps": 8})


def test_a_student_that_is_trained_otherwise_than_it_writes_is_told(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    model = student_of(tokenizer, family="gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    with pytest.raises(UserError, match=r"step 1: log-probabilities of the sampled tokens differ by .* nats"):
        Run(tokenizer, store, tmp_path, model=model, max_gap=1e-3)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"share": 0.1}, "share = 0.1 of optim.batch_size = 4 is less than a row"),
        ({"per_prompt": 3}, "4 of a step's 4 rows are written by the student, which per_prompt = 3 does not divide"),
    ],
)
def test_steps_that_cannot_be_divided(fields: dict[str, Any], told: str) -> None:
    assert told in str(Samples(**fields).problem(4))
