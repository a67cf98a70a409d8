"""Rounds of groups: graded once, learned in several steps, the same bits after an interruption; and what rewards may not do."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_parts import chat_tokenizer, rows, tiny_model

from potstill.core.errors import Interrupted, UserError
from potstill.core.types import Abstain, Example
from potstill.data.batches import StepRow, pack_rows
from potstill.data.prompts import Prompts, Renderer
from potstill.data.rollout import Rollout
from potstill.data.store import Counts, TokenStore, weighted_pairs
from potstill.edges.decoding import undisturbed
from potstill.losses.policy import Policy, PolicyGradient
from potstill.rewards import Answered, Reward
from potstill.rollouts.local import Local
from potstill.teachers.signals import Live
from potstill.train.grading import Grades, attribution, graded, names_of
from potstill.train.groups import Groups, GroupSamples
from potstill.train.loop import Optim, fit, tokens_of
from potstill.train.work import CheckpointRules, Work

SEED, NEW = 7, 6
Score = Callable[[Rollout], float]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chat_tokenizer()


@pytest.fixture(scope="module")
def store(tokenizer: Any, tmp_path_factory: Any) -> TokenStore:
    """Rows of weights 1, 2 and 3."""
    examples = [Example(str(i), row["instruction"], row["response"], weight=1.0 + i % 3) for i, row in enumerate(rows(12))]
    pairs = weighted_pairs(examples, Renderer(tokenizer, Prompts()), Counts())
    return TokenStore.write(tmp_path_factory.mktemp("store"), pairs, Counts(), "here")


def parity(answer: Rollout) -> float:
    return float(sum(answer.ids) % 2)


def own_length(answer: Rollout) -> float:
    """Different for nearly all answers, so that all but a few teach."""
    return len(answer.ids) + answer.ids[0] / 1000


class Run:
    """One training by groups; rewards are two functions of an answer, NaN where they abstain."""

    def __init__(self, tokenizer: Any, store: TokenStore, folder: Path, scores: Sequence[Score] = (parity,), **more: Any):
        self.model = tiny_model("gpt2", len(tokenizer), seed=0, std=0.1).to(more.pop("dtype", torch.float32))
        dtype = next(self.model.parameters()).dtype
        self.optim = Optim.model_validate(
            {"lr": 3e-3, "steps": 4, "batch_size": 12, "precision": "fp32"} | more.pop("optim", {})
        )
        self.policy = Policy.model_validate({"cut": "counted", **more.pop("policy", {})})
        stop_at, every = more.pop("stop_at", None), more.pop("checkpoint", None)
        self.samples = GroupSamples.model_validate({"per_prompt": 4, "max_new_tokens": NEW, "updates": 2} | more)
        vocab, stops = len(tokenizer), list(range(0, len(tokenizer), 10))
        self.teacher = Live(tiny_model("qwen2", vocab, seed=9, std=0.1).to(dtype).requires_grad_(False))
        reference = Live(tiny_model("gpt2", vocab, seed=3, std=0.1).to(dtype).requires_grad_(False))
        reference = reference if self.policy.beta else None
        self.objective = PolicyGradient(self.policy, vocab, self.samples.temperature, self.teacher, reference)
        self.drawn: list[tuple[list[int], list[Rollout]]] = []
        self.judged: list[list[StepRow]] = []
        self.said: list[str] = []

        def grade(of: Sequence[int], found: Sequence[Rollout]) -> Grades:
            self.drawn.append((list(of), list(found)))
            value_AK = np.array([[score(answer) for score in scores] for answer in found])
            missing = int(np.isnan(value_AK).sum())
            return Grades(value_AK, np.ones(len(scores)), {"it: cannot say": missing} if missing else {})

        def judge(found: Sequence[StepRow]) -> Any:
            self.judged.append(list(found))
            with undisturbed(self.model):
                told = self.objective.judged(self.model, found, self.optim.pass_tokens(64))
            return told.rows, told.figures

        engine = Local(self.model, tokenizer, stops, vocab=vocab)
        names = [f"r{k}" for k in range(len(scores))]
        watch, say = lambda done, total: None, self.said.append
        self.groups = Groups(store, self.optim, self.samples, self.objective, engine, grade, names, judge, SEED, watch, say)
        work = Work(folder, "here", checkpoint=CheckpointRules(every_steps=every))
        if stop_at is not None:
            work.stop_requested = lambda: len(lines(folder)) >= stop_at
        self.totals = fit(self.model, store, self.objective, self.optim, work, seed=SEED, lessons=self.groups, dropout=False)
        self.figures = lines(folder)


def lines(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_steps_loss_is_that_of_its_groups(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    """Prompts, weights and advantages by hand, from what was drawn; then one plain sum over the step."""
    run = Run(tokenizer, store, tmp_path, dtype=torch.float64, optim={"steps": 1})
    (found,), ((of, answers),), (learned,) = run.figures, run.drawn, run.judged
    numbers = run.groups.rows(0)
    assert of == [n for n in numbers for _ in range(4)]
    wanted, count, rest = 0.0, 0.0, list(learned)
    for n in range(3):
        group = answers[4 * n : 4 * n + 4]
        mean = sum(map(parity, group)) / 4
        for answer in group:
            weight = store.weight(numbers[n])
            wanted -= weight * len(answer.ids) * (parity(answer) - mean)  # every ratio is 1
            count += weight * len(answer.ids)
            if parity(answer) == mean:  # it teaches nothing
                continue
            row = rest.pop(0)
            assert list(row.prompt) == [int(i) for i in store[numbers[n]][0]]
            assert (list(row.response), row.weight) == (answer.ids, weight)
            assert row.given["advantage"].tolist() == pytest.approx([parity(answer) - mean] * len(answer.ids))
    assert not rest
    assert 0 < len(learned) < 12
    assert found["loss"] == pytest.approx(wanted / count, abs=1e-6)  # the sampler is float32
    assert found["samples_reward_r0"] == found["samples_reward_total"] == pytest.approx(np.mean(list(map(parity, answers))))
    assert (found["samples_ratio_min"], found["samples_ratio_max"]) == pytest.approx((1.0, 1.0), abs=1e-6)
    assert found["samples_gap"] < 1e-6
    model = tiny_model("gpt2", len(tokenizer), seed=0, std=0.1).double()
    loss = run.objective(model, pack_rows(run.groups.drawn.rows)).total / tokens_of(learned)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert found["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)  # what is judged is kept in float32


BOTH_WAYS: dict[str, dict[str, Any]] = {
    "recommended": {},
    "with a reference": {"beta": 0.1, "group_std": True},
    "with a teacher": {"beta_kd": 0.1, "normaliser": "max_length"},
    "whole answers": {"ratio": "sequence", "beta": 0.1, "sampler_cap": 1.1},
    "means of answers": {"ratio": "sequence_mean", "beta": 0.1, "beta_kd": 0.1, "normaliser": "sequence"},
}


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_an_only_update_learns_without_judging_first_what_the_first_of_two_does(
    name: str, store: TokenStore, tokenizer: Any, tmp_path: Path
) -> None:
    """The same bits: weights, loss, gradient norm and every figure; in several micro-batches, of rows of several weights."""
    fields: dict[str, Any] = {"policy": BOTH_WAYS[name], "optim": {"steps": 1, "micro_batch_tokens": 100}}
    two, one = (Run(tokenizer, store, tmp_path / str(n), **fields, updates=n) for n in (2, 1))
    assert (len(two.judged), len(one.judged)) == (1, 0)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert one.figures[0].keys() == two.figures[0].keys()
    assert one.figures[0] == pytest.approx(two.figures[0], rel=1e-6)
    exact = ("loss", "grad_norm", "samples_ratio_min", "samples_ratio_max", "samples_nll", "samples_policy")
    assert [one.figures[0][figure] for figure in exact] == [two.figures[0][figure] for figure in exact]
    assert 0 < one.figures[0]["samples_gap"] < 1e-5


def test_a_round_is_drawn_once_and_its_later_ratios_move(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    run = Run(tokenizer, store, tmp_path, [own_length], optim={"steps": 5})
    assert [line["samples_age"] for line in run.figures] == [0, 1, 0, 1, 0]
    assert len(run.drawn) == 3
    assert [line["samples_ratio_max"] > 1 for line in run.figures] == [False, True, False, True, False]
    assert run.totals.generated_tokens == sum(len(answer.ids) for _, answers in run.drawn for answer in answers)
    learned = [sum(len(row.response) for row in rows) for rows in run.judged]
    assert run.totals.sampled_tokens == 2 * learned[0] + 2 * learned[1] + learned[2]


ALL = {"beta": 0.1, "beta_kd": 0.1, "group_std": True, "redraws": 1}


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_stopped_in_the_middle_of_a_round_it_ends_the_same(
    ratio: str, at: int, store: TokenStore, tokenizer: Any, tmp_path: Path
) -> None:
    """Answers, advantages, log-probabilities of trainer and reference lie in the checkpoint."""
    fields: dict[str, Any] = {"optim": {"steps": 5}, "policy": ALL | {"ratio": ratio}, "updates": 3}
    whole = Run(tokenizer, store, tmp_path / "whole", **fields)
    with pytest.raises(Interrupted):
        Run(tokenizer, store, tmp_path / "parts", **fields, checkpoint=1, stop_at=at)
    again = Run(tokenizer, store, tmp_path / "parts", **fields)
    assert again.figures == whole.figures
    assert again.totals.generated_tokens == whole.totals.generated_tokens
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))


def test_micro_batches_change_nothing(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    for normaliser in ("tokens", "sequence", "max_length"):
        one, many = (
            Run(
                tokenizer,
                store,
                tmp_path / f"{normaliser}-{size}",
                dtype=torch.float64,
                optim={"micro_batch_tokens": size, "steps": 2},
                policy={"normaliser": normaliser, "ratio": "sequence_mean"},
            )
            for size in (1, 10_000)
        )
        for a, b in zip(one.figures, many.figures, strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


# --- groups without signal ---


def test_prompts_without_signal_are_counted_and_replaced_by_others(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    """A rare reward: most groups are equal; other prompts take their place, none twice, until there are no more."""

    def rare(answer: Rollout) -> float:
        return float(sum(answer.ids) % 9 == 0)

    once, again = (
        Run(tokenizer, store, tmp_path / str(n), [rare], policy={"redraws": n}, optim={"steps": 1, "batch_size": 24}, updates=1)
        for n in (0, 3)
    )
    assert once.drawn[0][0] == again.drawn[0][0]
    assert [a.ids for a in once.drawn[0][1]] == [a.ids for a in again.drawn[0][1]]
    silent = [n for n in range(6) if len({rare(a) for a in again.drawn[0][1][4 * n : 4 * n + 4]}) == 1]
    assert 0 < len(silent) < 6
    prompts = [of[::4] for of, _ in again.drawn]
    assert prompts[0] == again.groups.rows(0)
    every = [row for of in prompts for row in of]
    assert len(set(every)) == len(every) <= 12
    lacking, left = len(silent), 12 - 6
    for (_, answers), of in zip(again.drawn[1:], prompts[1:], strict=True):
        assert len(of) == min(lacking, left)
        groups = [answers[4 * n : 4 * n + 4] for n in range(len(of))]
        lacking, left = sum(len({rare(a) for a in group}) == 1 for group in groups), left - len(of)
    assert len(again.drawn) == 4 or not lacking or not left
    first, other = once.figures[0], again.figures[0]
    assert first["samples_silent"] == other["samples_silent"] == pytest.approx(len(silent) / 6)
    assert first["samples_reward_r0"] == other["samples_reward_r0"]  # of what was not chosen by its reward
    assert other["samples_redrawn"] == pytest.approx(sum(len(of) // 4 for of, _ in again.drawn[1:]) / 6)
    assert first["samples_redrawn"] == 0
    assert again.totals.generated_tokens == sum(len(a.ids) for _, answers in again.drawn for a in answers)
    assert len(again.drawn) <= 4
    assert all(np.abs(row.given["advantage"]).min() > 0 for row in again.groups.drawn.rows)
    assert len(once.groups.drawn.rows) == 4 * (6 - len(silent))


def turning(rounds: int) -> Score:
    """A reward that is silent on one group of four in so many rounds of three, and on all of them afterwards."""
    asked = [0]

    def score(answer: Rollout) -> float:
        number, asked[0] = asked[0] // 4, asked[0] + 1
        return 0.5 if number % 3 == 1 or number >= 3 * rounds else own_length(answer)

    return score


@pytest.mark.parametrize("normaliser", ["tokens", "sequence", "max_length"])
@pytest.mark.parametrize("ratio", ["token", "sequence_mean"])
def test_leaving_out_what_teaches_nothing_changes_nothing_but_what_is_read(
    ratio: str, normaliser: str, store: TokenStore, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, gradient norm and weights over rounds with, with some and without any signal: AdamW steps on in silence too."""

    def run(name: str) -> Run:
        policy = {"normaliser": normaliser, "ratio": ratio}
        fields: dict[str, Any] = {"optim": {"steps": 6, "weight_decay": 0.1}, "patience": 0, "dtype": torch.float64}
        return Run(tokenizer, store, tmp_path / name, [turning(2)], policy=policy, **fields)

    fewer = run("fewer")
    monkeypatch.setattr(Groups, "_teaching", lambda self, rows: list(rows))
    whole = run("whole")
    assert [len(rows) for rows in whole.judged] == [12, 12, 12]
    assert [4 < len(rows) <= 8 for rows in fewer.judged[:2]] == [True, True]
    assert [len(row.response) for row in fewer.judged[2]] == [min(len(answer.ids) for answer in fewer.drawn[2][1])]
    assert whole.figures[5]["grad_norm"] == fewer.figures[5]["grad_norm"] == 0
    for figure in ("loss", "grad_norm", "samples_reward_r0", "samples_silent", "samples_length"):
        assert [a[figure] for a in fewer.figures] == pytest.approx([b[figure] for b in whole.figures], rel=1e-6, abs=1e-7), (
            figure
        )
    for a, b in zip(fewer.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)  # a step moves a weight by 3e-3
    assert fewer.totals.sampled_tokens < whole.totals.sampled_tokens
    assert fewer.totals.generated_tokens == whole.totals.generated_tokens


@pytest.mark.parametrize("policy", [{"beta": 0.1}, {"beta_kd": 0.1}])
def test_what_a_reference_or_a_teacher_pulls_is_learned_in_silence_too(
    policy: dict[str, float], store: TokenStore, tokenizer: Any, tmp_path: Path
) -> None:
    run = Run(tokenizer, store, tmp_path, [lambda a: 0.5], policy=policy, optim={"steps": 1}, updates=1)
    assert len(run.groups.drawn.rows) == 12
    assert run.figures[0]["grad_norm"] > 0


def test_a_long_silence_ends_training(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 3: in samples.patience = 3 rounds no group's rewards differed \(the last: 0.5"):
        Run(tokenizer, store, tmp_path / "a", [lambda a: 0.5], patience=3, updates=1)
    with pytest.raises(UserError, match=r"step 2: in samples.patience = 2"):
        Run(tokenizer, store, tmp_path / "b", [lambda a: 0.5], patience=2, updates=1, policy={"redraws": 1})
    run = Run(tokenizer, store, tmp_path / "c", [lambda a: 0.5], patience=0, updates=1)
    assert all(line["samples_silent"] == 1 and line["grad_norm"] == 0 for line in run.figures)
    assert "samples_attribution_r0" not in run.figures[0]


def test_the_silence_is_counted_through_an_interruption(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"patience": 4, "updates": 1, "optim": {"steps": 9}}
    with pytest.raises(Interrupted):
        Run(tokenizer, store, tmp_path, [lambda a: 0.5], **fields, checkpoint=1, stop_at=2)
    with pytest.raises(UserError, match=r"step 4: in samples.patience = 4"):
        Run(tokenizer, store, tmp_path, [lambda a: 0.5], **fields)


# --- abstentions, cut answers ---


def test_an_abstention_leaves_its_group(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    """It is no zero: the mean of the others does not know of it, and it is not learned."""

    def unsure(answer: Rollout) -> float:
        return math.nan if sum(answer.ids) % 3 == 0 else parity(answer)

    run = Run(tokenizer, store, tmp_path, [unsure, lambda a: 1.0], optim={"steps": 1})
    ((_, answers),), (learned,) = run.drawn, run.judged
    wanted, lost = [], 0
    for n in range(3):
        group = [answer for answer in answers[4 * n : 4 * n + 4] if not math.isnan(unsure(answer))]
        advantages = [parity(a) - np.mean(list(map(parity, group))) for a in group]
        wanted += [(a.ids, advantage) for a, advantage in zip(group, advantages, strict=True) if advantage]
        lost += 4 - len(group)
    assert [(list(row.response), pytest.approx(row.given["advantage"][0], abs=1e-12)) for row in learned] == wanted
    assert 0 < lost < 12
    assert run.figures[0]["samples_abstained"] == pytest.approx(lost / 12)
    assert run.figures[0]["samples_reward_r1"] == 1.0  # of those that it does grade: all
    assert run.said == [f"{lost} of a round's 12 answers were not graded: it: cannot say"]


def test_nothing_but_abstentions_ends_training(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 3: in 3 rounds no answer could be graded \(it: cannot say\)"):
        Run(tokenizer, store, tmp_path, [lambda a: math.nan], updates=1)


def test_cut_answers_stay_in_their_group_and_leave_the_loss(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    few: dict[str, Any] = {"max_new_tokens": 3, "optim": {"steps": 1}}
    counted, masked = (Run(tokenizer, store, tmp_path / cut, policy={"cut": cut}, **few) for cut in ("counted", "masked"))
    ((_, answers),) = counted.drawn
    every = {tuple(row.response): row.given["advantage"][0] for row in counted.judged[0]}
    kept = [(tuple(row.response), row.given["advantage"][0]) for row in masked.judged[0]]
    assert [ids for ids, _ in kept] == [tuple(answer.ids) for answer in answers if answer.finished]
    assert 0 < len(kept) < 12
    assert all(every[ids] == advantage for ids, advantage in kept)
    assert masked.totals.generated_tokens == counted.totals.generated_tokens


def test_nothing_but_cut_answers_ends_training(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"was cut at samples.max_new_tokens = 1, .* \(policy.cut = 'counted'\)"):
        Run(
            tokenizer,
            store,
            tmp_path,
            policy={"cut": "masked"},
            max_new_tokens=1,
            updates=1,
            per_prompt=2,
            optim={"batch_size": 2, "steps": 8},
        )


def test_a_gap_between_drawing_and_judging_is_refused(store: TokenStore, tokenizer: Any, tmp_path: Path) -> None:
    """Before the first update of what was drawn so, whether the answers were judged or have this update alone."""
    for updates in (1, 2):
        folder = tmp_path / str(updates)
        with pytest.raises(UserError, match=r"step 1: log-probabilities .* samples.max_gap = 1e-12"):
            Run(tokenizer, store, folder, max_gap=1e-12, updates=updates)
        assert not lines(folder)


# --- grading ---


def test_attribution_by_hand() -> None:
    """Two groups; the second reward moves half as far and once against the first."""
    groups = [np.array([[1.0, 0.0], [0.0, 0.5]]), np.array([[2.0, 1.0], [0.0, 0.0]])]
    # centred: (½, −¼), (−½, ¼); (1, ½), (−1, −½); sums ¼, −¼, 3/2, −3/2: variance 2 · (1/16 + 9/4)
    variance = 2 * (1 / 16 + 9 / 4)
    first, second = 2 * (1 / 8 + 3 / 2), 2 * (-1 / 16 + 3 / 4)
    assert attribution(groups) == pytest.approx([first / variance, second / variance])
    assert first + second == variance
    assert attribution([]) is None
    assert attribution([np.ones((3, 2))]) is None


def answered(text: str = "it") -> Answered:
    return Answered(Example("k", "Say it.", "it"), text, 2, True)


def reward_that_gives(value: Any) -> Reward:
    class Given(Reward, kind="given_by_tests"):
        def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
            return value if isinstance(value, list) else [value] * len(answers)

    del Reward.kinds["given_by_tests"]
    return Given(weight=2.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "1", [], [1.0], 1j])
def test_a_reward_that_gives_no_number_is_named(value: Any) -> None:
    with pytest.raises(UserError, match="rewards: 'given_by_tests' gave"):
        graded([reward_that_gives(value)], [answered(), answered()])


def test_numbers_of_any_type_and_abstentions_are_taken() -> None:
    found = graded([reward_that_gives([True, np.float32(0.5), 3, Abstain("why")])], [answered()] * 4)
    assert found.total_A[:3].tolist() == [2.0, 1.0, 6.0]
    assert math.isnan(found.total_A[3])
    assert found.reasons == {"given_by_tests: why": 1}


def test_kinds_that_occur_twice_are_told_apart() -> None:
    class One(Reward, kind="one_of_tests"):
        def __call__(self, answers: Sequence[Answered]) -> list[float | Abstain]:
            return [0.0 for _ in answers]

    del Reward.kinds["one_of_tests"]
    assert names_of([One(), reward_that_gives(1.0), One()]) == ["one_of_tests_1", "given_by_tests", "one_of_tests_2"]


def test_a_row_is_known_by_its_number_though_others_were_left_out(tokenizer: Any, tmp_path: Path) -> None:
    examples = [Example(str(i), row["instruction"], row["response"]) for i, row in enumerate(rows(9))]
    examples[0], examples[4] = (
        Example("0", "long " * 900, "it"),
        Example("4", "no weight", "it", weight=0.0),
    )
    store = TokenStore.write(tmp_path, weighted_pairs(examples, Renderer(tokenizer, Prompts()), Counts()), Counts(), "here")
    assert [store.number(i) for i in range(len(store))] == [1, 2, 3, 5, 6, 7, 8]
    for i in range(len(store)):
        assert examples[store.number(i)].instruction in tokenizer.decode(store[i][0])
