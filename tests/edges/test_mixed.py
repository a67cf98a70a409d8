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
    """Nor do rows that leave or enter: 4 places are fewer than rows, 2 fewer than a prompt's samples."""
    together, *others = (engine(parts, 0.2, most)(PROMPTS, 3, SAMPLING, seed=4) for most in (64, 4, 2, 1))
    for other in others:
        assert [a.ids for a in together] == [b.ids for b in other]
        for a, b in zip(together, other, strict=True):
            assert np.allclose(a.logp_N, b.logp_N, atol=1e-5)


def test_rows_that_have_ended_are_read_no_more(parts: Any) -> None:
    """Every forward pass of either model has the rows that are in work, and at most an eighth more."""
    student, teacher, tokenizer = parts
    sizes: dict[str, list[int]] = {"student": [], "teacher": []}
    hooks = [
        model.register_forward_pre_hook(
            lambda _, __, kwargs, name=name: sizes[name].append(len(kwargs["input_ids"])), with_kwargs=True
        )
        for name, model in (("student", student), ("teacher", teacher))
    ]
    stops = list(range(0, len(tokenizer), 3))
    found = Mixed(student, teacher, tokenizer, stops, 0.2, len(tokenizer))(PROMPTS, 8, Sampling(max_new_tokens=20), seed=4)
    for hook in hooks:
        hook.remove()
    assert len({len(rollout.ids) for rollout in found}) > 2, "the law needs answers of several lengths"
    assert sizes["student"] == sizes["teacher"]
    read, *steps = sizes["student"]
    assert read == len(PROMPTS), "a prompt is read once for all of its samples"
    for n, rows in enumerate(steps, 1):
        live = sum(len(rollout.ids) >= n for rollout in found)  # rows that this token ends leave after it
        assert live <= rows <= live / (1 - 1 / 8) + 1
    assert min(steps) < len(found) / 2


def test_without_the_teacher_it_draws_what_the_local_engine_draws(parts: Any) -> None:
    _, _, tokenizer = parts
    narrow = tiny_model("qwen2", len(tokenizer), seed=1, std=0.4)
    found = engine((narrow, parts[1], tokenizer), 0.0)(PROMPTS, 2, SAMPLING, seed=4)
    wanted = Local(narrow, tokenizer, [0])(PROMPTS, 2, SAMPLING, 4)
    assert [a.ids for a in found] == [b.ids for b in wanted]
    assert all(np.allclose(a.logp_N, b.logp_N, atol=1e-5) for a, b in zip(found, wanted, strict=True))


WRONG = {
    "temperature": ([Asked((5,))], {"top_p": 0.9}, "temperature 1"),
    "empty": ([Asked((5,)), Asked()], {}, "prompt 1 has no tokens"),
    "unknown to both": ([Asked((5, 1_000_000))], {}, "prompt 0 has the token 1000000, and the teacher knows"),
    "negative": ([Asked((-1,))], {}, "prompt 0 has the token -1"),
    "positions": ([Asked((5,))], {"max_new_tokens": 100_000}, r"more than the teacher's \d+ positions"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_it_cannot_read_is_refused(name: str, parts: Any) -> None:
    prompts, sampling, told = WRONG[name]
    with pytest.raises(UserError, match=told):
        engine(parts, 0.2)(prompts, 1, Sampling.model_validate({"max_new_tokens": 2} | sampling), 0)


def test_tokens_that_only_the_teacher_knows_are_refused(parts: Any) -> None:
    student, _, tokenizer = parts
    wide = tiny_model("llama", len(tokenizer) + 64, width=16, seed=2)
    with pytest.raises(UserError, match=f"prompt 0 has the token {len(tokenizer) + 8}, and the model knows"):
        engine((student, wide, tokenizer), 0.2)([Asked((len(tokenizer) + 8,))], 1, Sampling(max_new_tokens=2), 0)
