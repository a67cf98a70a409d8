"""A student as its teacher's draft model: what the distributions predict is what transformers' assisted generation accepts."""

import statistics
from typing import Any

import pytest
import torch
from tiny_parts import tiny_model

from potstill.core.errors import UserError
from potstill.core.types import Abstain
from potstill.divergences.total_variation import TotalVariation
from potstill.edges.assisted import Drafting, accepted_of, draft_answer, draft_answers
from potstill.losses.scoring import token_sums
from potstill.metrics.acceptance import Acceptance, tokens_per_pass
from potstill.metrics.draft_acceptance import DraftAcceptance
from potstill.metrics.speculative import Speculative

VOCAB = 64


def pair(noise: float) -> tuple[Any, Any]:
    """A teacher, and a student that is the teacher with noise on its weights."""
    teacher, student = (tiny_model("qwen2", VOCAB, std=0.4, tie_word_embeddings=False, eos=None) for _ in range(2))
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in student.parameters():
            weight += noise * torch.randn_like(weight)
    return student, teacher


def test_acceptance_is_what_total_variation_leaves() -> None:
    generator = torch.Generator().manual_seed(0)
    logp, logq = (torch.randn(50, 30, generator=generator, dtype=torch.float64).mul(3).log_softmax(-1) for _ in range(2))
    logp[0, 3:] = -torch.inf
    logp = logp.log_softmax(-1)
    target = torch.zeros(50, dtype=torch.long)
    expected = 100 * (1 - TotalVariation()(logp, logq))
    assert torch.allclose(Acceptance()(logq, target, logp), expected, atol=1e-12)
    assert torch.allclose(Acceptance()(logp, target, logp), torch.tensor(100.0, dtype=torch.float64))


@pytest.mark.parametrize("acceptance, drafts, expected", [(0.0, 4, 1.0), (1.0, 4, 5.0), (0.5, 2, 1.75), (0.8, 5, 3.68928)])
def test_tokens_per_pass_by_hand(acceptance: float, drafts: int, expected: float) -> None:
    assert tokens_per_pass(acceptance, drafts) == pytest.approx(expected)


def test_what_is_predicted_is_what_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prediction on the very texts that the teacher wrote, against the accepted share, within four standard errors."""
    student, teacher = pair(0.08)
    drafts, prompt, written = 3, [1, 2, 3, 4], []
    own = teacher.generate

    def generate(ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        text = own(ids, **arguments)
        written.append(text[0].tolist())
        return text

    monkeypatch.setattr(teacher, "generate", generate)
    made = [draft_answer(student, teacher, prompt, drafts=drafts, new_tokens=50, seed=seed) for seed in range(4)]
    accepted, refused = sum(one.accepted for one in made), sum(one.refused for one in made)
    texts = [(text[:4], text[4:]) for text in written[::2]]  # with drafts; the others were written without
    sums = token_sums(student, teacher, texts, VOCAB, {"acceptance": Acceptance()})["acceptance"]
    predicted = sum(sums) / sum(len(answer) for _, answer in texts) / 100
    error = (predicted * (1 - predicted) / (accepted + refused)) ** 0.5
    assert 0.3 < predicted < 0.95, "neither alike nor strangers, or nothing would be tested"
    assert accepted / (accepted + refused) == pytest.approx(predicted, abs=4 * error)
    passes, tokens = sum(one.passes for one in made), sum(one.tokens for one in made)
    assert tokens == 200
    assert tokens / passes == pytest.approx(tokens_per_pass(predicted, drafts), rel=0.15)


def test_a_model_that_is_its_own_teacher_is_never_refused() -> None:
    _, teacher = pair(0)
    student, _ = pair(0)
    one = draft_answer(student, teacher, [1, 2, 3], drafts=4, new_tokens=50)
    assert (one.refused, one.passes, one.tokens, one.accepted) == (0, 10, 50, 40)
    assert DraftAcceptance().scores([one]) == [100]


def test_its_own_teacher_refuses_nothing_where_answers_end_by_a_stop_token() -> None:
    (student, _), (_, teacher) = pair(0), pair(0)
    ends = list(range(0, VOCAB, 8))
    made = [draft_answer(student, teacher, [1, 2, 3], drafts=4, new_tokens=50, seed=seed, stop_ids=ends) for seed in range(12)]
    assert sum(one.tokens for one in made) < 12 * 50 // 2, "answers end by themselves"
    assert sum(one.accepted + one.passes - one.tokens for one in made) > 0, "some of them by a drafted token"
    assert sum(one.refused for one in made) == 0
    looked_at = [score for score in DraftAcceptance().scores(made) if isinstance(score, float)]
    assert looked_at == pytest.approx([100] * len(looked_at))


def test_accepted_by_hand() -> None:
    for drafts, text, expected in (
        ([[1, 2, 3], [5, 6, 7]], [1, 2, 3, 4, 5, 9], (4, 1)),  # all and one more; one, and another in place of the second
        ([[1, 2, 3]], [1, 2], (2, 0)),  # ended within the draft
        ([[1, 2, 3]], [1, 2, 3], (3, 0)),  # ended with it
        ([[1, 2], []], [9, 8], (0, 1)),  # refused at once; no room for a draft
    ):
        assert accepted_of(drafts, text) == expected


def test_figures_are_those_of_all_answers_together() -> None:
    """40 of 50 tokens accepted is 80 %, though the short answer has half of its drafts; 30 s for 60 tokens, or 12 s for 48."""
    short, long = Drafting(1, 1, 2, 3, 2.0, 10, 20.0), Drafting(39, 9, 12, 45, 10.0, 50, 10.0)
    acceptance, speed = DraftAcceptance().scores([short, long]), Speculative().scores([short, long])
    assert statistics.fmean(s for s in acceptance if isinstance(s, float)) == pytest.approx(80)
    assert statistics.fmean(s for s in speed if isinstance(s, float)) == pytest.approx((30 / 60) / (12 / 48))
    none = Drafting(0, 0, 1, 1, 1.0, 1, 1.0)
    assert [isinstance(s, Abstain) for s in DraftAcceptance().scores([none, none])] == [True, True]
    assert DraftAcceptance().scores([Drafting(0, 3, 3, 3, 1.0, 3, 1.0)]) == [0]


def test_both_ways_are_warmed_up_and_each_is_first_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair(0.05)
    own, ways = teacher.generate, []

    def generate(ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        ways.append(("drafts" if "assistant_model" in arguments else "alone", ids.shape[1]))
        return own(ids, **arguments)

    monkeypatch.setattr(teacher, "generate", generate)
    made = draft_answers(student, teacher, [[1, 2], [1, 2, 3], [1, 2, 3, 4]], drafts=2, new_tokens=10)
    assert ways[:2] == [("drafts", 2), ("alone", 2)]
    assert ways[2:] == [("drafts", 2), ("alone", 2), ("alone", 3), ("drafts", 3), ("drafts", 4), ("alone", 4)]
    assert [(one.tokens, one.alone_tokens) for one in made] == [(10, 10)] * 3


def test_a_stranger_is_refused_mostly() -> None:
    _, teacher = pair(0)
    stranger = tiny_model("qwen2", VOCAB, std=0.8, seed=7, tie_word_embeddings=False, eos=None)
    one = draft_answer(stranger, teacher, [1, 2, 3], drafts=4, new_tokens=50)
    assert one.accepted < one.refused
    assert one.accepted + one.passes == one.tokens


def test_answers_end_where_they_are_told_and_odd_pairs_are_refused() -> None:
    student, teacher = pair(0.05)
    ends = list(range(0, VOCAB, 4))
    assert draft_answer(student, teacher, [1, 2, 3], drafts=4, new_tokens=50, stop_ids=ends).tokens < 50
    with pytest.raises(UserError, match="64 rows of embeddings against 80; leave the metrics speculative"):
        draft_answer(student, tiny_model("qwen2", 80), [1], drafts=2, new_tokens=4)
    with pytest.raises(UserError, match="more than the model's 256 positions"):
        draft_answer(student, teacher, [1], drafts=2, new_tokens=300)
