"""Answers drawn from teacher and student together are drawn from the mixture that their log-probabilities name."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_parts import chat_tokenizer, tiny_model

from potstill.core.errors import UserError
from potstill.data.rollout import Asked, Rollout, Sampling
from potstill.rollouts.local import Local
from potstill.rollouts.mixed import Mixed

PROMPTS = [Asked((5, 6, 7)), Asked((9, 8)), Asked((5, 6, 7, 11, 12))]
SAMPLING = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any, Any]:
    tokenizer = chat_tokenizer(320)
    student = tiny_model("qwen2", len(tokenizer) + 8, seed=1, std=0.4)
    return student, tiny_model("llama", len(tokenizer) + 3, width=16, seed=2, std=0.6), tokenizer


def engine(parts: tuple[Any, Any, Any], alpha: float, most: int = 64) -> Mixed:
    student, teacher, tokenizer = parts
    return Mixed(student, teacher, tokenizer, [0], alpha, len(tokenizer), most)


def of_the_mixture(parts: tuple[Any, Any, Any], rollout: Rollout, alpha: float) -> list[float]:
    """From one plain forward pass of each model over the whole answer."""
    student, teacher, tokenizer = parts
    prompt = PROMPTS[rollout.prompt].ids
    with torch.no_grad():
        q, p = (
            model(torch.tensor([[*prompt, *rollout.ids]]))
            .logits[0, len(prompt) - 1 : -1, : len(tokenizer)]
            .double()
            .softmax(-1)
            for model in (student, teacher)
        )
    mixed = alpha * p + (1 - alpha) * q
    return [mixed[t, token].log().item() for t, token in enumerate(rollout.ids)]


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.8])
def test_log_probabilities_are_the_mixtures(parts: Any, alpha: float) -> None:
    found = engine(parts, alpha)(PROMPTS, 3, SAMPLING, seed=4)
    assert [rollout.prompt for rollout in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for rollout in found:
        assert rollout.logp_N.tolist() == pytest.approx(of_the_mixture(parts, rollout, alpha), abs=1e-5)
        assert rollout.finished or len(rollout.ids) == 6
    other = of_the_mixture(parts, found[0], 0.5)
    assert found[0].logp_N.tolist() != pytest.approx(other, abs=1e-3), "the law would notice another mixture"


def test_other_rows_beside_it_change_no_answer(parts: Any) -> None:
    together, alone = (engine(parts, 0.2, most)(PROMPTS, 3, SAMPLING, seed=4) for most in (64, 1))
    assert [a.ids for a in together] == [b.ids for b in alone]


def test_without_the_teacher_it_draws_what_the_local_engine_draws(parts: Any) -> None:
    _, _, tokenizer = parts
    narrow = tiny_model("qwen2", len(tokenizer), seed=1, std=0.4)
    found = engine((narrow, parts[1], tokenizer), 0.0)(PROMPTS, 2, SAMPLING, seed=4)
    wanted = Local(narrow, tokenizer, [0])(PROMPTS, 2, SAMPLING, 4)
    assert [a.ids for a in found] == [b.ids for b in wanted]
    assert all(np.allclose(a.logp_N, b.logp_N, atol=1e-5) for a, b in zip(found, wanted, strict=True))


def test_what_has_other_weights_is_refused(parts: Any) -> None:
    with pytest.raises(UserError, match="temperature 1"):
        engine(parts, 0.2)(PROMPTS, 1, Sampling(max_new_tokens=2, top_p=0.9), 0)
