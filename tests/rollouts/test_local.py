"""The local engine: a sample depends on its own prompt, number and seed, and its log-probabilities are the trainer's."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_parts import chat_tokenizer, tiny_model

from potstill.core.errors import UserError
from potstill.data.rollout import Asked, Sampling
from potstill.losses.scoring import sequence_logp
from potstill.rollouts import Local

PROMPTS = [Asked(tuple(range(5, 5 + length))) for length in (3, 20, 7, 50, 3, 9)]  # the fifth is the first one again
SAMPLING = Sampling(max_new_tokens=16)
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
FAMILIES: dict[str, dict[str, Any]] = {"qwen2": {}, "gpt2": {}, "gemma3_text": WINDOW}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chat_tokenizer()


def asked(model: Any, tokenizer: Any, prompts: Any = PROMPTS, sampling: Sampling = SAMPLING, **more: Any) -> Any:
    return Local(model, tokenizer, [0], **more)(prompts, 5, sampling, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_is_the_same_in_any_company_and_its_trainer_sees_it_so(family: str, tokenizer: Any) -> None:
    model = tiny_model(family, len(tokenizer), std=0.2, **FAMILIES[family])
    found = asked(model, tokenizer)
    again = asked(model, tokenizer)
    assert [(a.ids, a.logp_N.tolist()) for a in found] == [(b.ids, b.logp_N.tolist()) for b in again]
    assert len({tuple(a.ids) for a in found}) > 20
    for most in (1, 4, 7):
        other = asked(model, tokenizer, most=most)
        assert [b.ids for b in other] == [a.ids for a in found]
        for a, b in zip(found, other, strict=True):
            np.testing.assert_allclose(a.logp_N, b.logp_N, atol=1e-5)
    alone = asked(model, tokenizer, prompts=PROMPTS[3:4])
    assert [b.ids for b in alone] == [a.ids for a in found if a.prompt == 3]
    shorter = asked(model, tokenizer, sampling=Sampling(max_new_tokens=4))
    assert [b.ids for b in shorter] == [a.ids[:4] for a in found]
    trainer = sequence_logp(model, [(PROMPTS[a.prompt].ids, a.ids) for a in found])
    for a, logp_N in zip(found, trainer, strict=True):
        np.testing.assert_allclose(a.logp_N, logp_N.numpy(), atol=2e-5)


def test_mode_and_random_state_are_as_before_and_bad_prompts_are_refused(tokenizer: Any) -> None:
    model = tiny_model("gpt2", len(tokenizer), resid_pdrop=0.5).train()
    before = torch.get_rng_state()
    first = asked(model, tokenizer)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert [a.ids for a in asked(model.eval(), tokenizer)] == [a.ids for a in first]
    assert asked(model, tokenizer, prompts=[]) == []
    for ids, said in (
        ((), "has no tokens"),
        ((10**6,), "the model knows"),
        ((5,) * 250, "more than the model's 256 positions"),
    ):
        with pytest.raises(UserError, match=said):
            asked(model, tokenizer, prompts=[Asked(ids)])


@pytest.mark.parametrize("temperature", [0, 1])
def test_only_leading_tokens_are_drawn_where_so_asked(temperature: float, tokenizer: Any) -> None:
    """A model's own padding of its output layer is no token; probabilities are over the others."""
    model = tiny_model("qwen2", len(tokenizer), std=0.2)
    sampling = Sampling(max_new_tokens=6, temperature=temperature)
    found = asked(model, tokenizer, sampling=sampling, vocab=12)
    assert max(token for each in asked(model, tokenizer, sampling=sampling) for token in each.ids) >= 12
    for each in found:
        prompt = PROMPTS[each.prompt].ids
        logits_TV = model(torch.tensor([[*prompt, *each.ids]])).logits[0, len(prompt) - 1 : -1, :12]
        logp_T = logits_TV.log_softmax(-1).gather(-1, torch.tensor(each.ids)[:, None]).squeeze(-1)  # fails where one is beyond
        np.testing.assert_allclose(each.logp_N, logp_T.detach().numpy(), atol=2e-5)
