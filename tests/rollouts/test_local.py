"""The local engine: a sample depends on its own prompt, number and seed, and its log-probabilities are the trainer's."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny_parts import chat_tokenizer, tiny_model
from trainer import sequence_logp

from potstill.core.errors import UserError
from potstill.core.progress import Progress
from potstill.data.rollout import Asked, Sampling
from potstill.rollouts import Local

PROMPTS = [Asked(tuple(range(5, 5 + length))) for length in (3, 20, 7, 50, 3, 9)]  # the fifth is the first one again
SAMPLING = Sampling(max_new_tokens=16)
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
FAMILIES: dict[str, dict[str, Any]] = {"qwen2": {}, "gpt2": {}, "gemma3_text": WINDOW, "gemma2": WINDOW | CAPS}


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


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_generate(family: str, tokenizer: Any) -> None:
    model = tiny_model(family, len(tokenizer), std=0.2, **FAMILIES[family])
    stops = list(range(0, len(tokenizer), 25))
    found = Local(model, tokenizer, stops, most=4)(PROMPTS, 1, Sampling(temperature=0, max_new_tokens=40), 0)
    for asked_for, one in zip(PROMPTS, found, strict=True):
        ids_1T = torch.tensor([asked_for.ids])
        with torch.inference_mode():
            whole_1T = model.generate(
                ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                max_new_tokens=40,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=0,
            )
        assert one.ids == whole_1T[0, len(asked_for.ids) :].tolist()
        assert one.finished is (one.ids[-1] in stops)
    assert len({len(one.ids) for one in found}) > 1
    own = sequence_logp(model, [(PROMPTS[one.prompt].ids, one.ids) for one in found])
    for one, logp_N in zip(found, own, strict=True):
        np.testing.assert_allclose(one.logp_N, logp_N.numpy(), atol=2e-5)


VOCAB, DRAWS = 9, 6000


def cut_and_tempered(logits_V: Any, sampling: Sampling) -> dict[int, float]:
    """The probabilities of tokens that can be drawn, by sorted loops in float64."""
    z = logits_V.double().tolist()
    left = sorted(range(len(z)), key=lambda v: (-z[v], v))[: sampling.top_k]
    weight = {v: math.exp((z[v] - max(z)) / sampling.temperature) for v in left}
    reached, nucleus = 0.0, []
    for v in left:
        if reached >= sampling.top_p:
            break
        nucleus.append(v)
        reached += weight[v] / sum(weight.values())
    kept = [v for v in nucleus if weight[v] >= sampling.min_p]
    return {v: weight[v] / sum(weight[k] for k in kept) for v in kept}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=2),
        Sampling(temperature=0.6, max_new_tokens=2),
        Sampling(temperature=1.7, top_k=4, max_new_tokens=2),
        Sampling(top_p=0.7, max_new_tokens=2),
        Sampling(min_p=0.3, max_new_tokens=2),
        Sampling(temperature=1.4, top_k=6, top_p=0.9, min_p=0.2, max_new_tokens=2),
    ],
    ids=lambda sampling: sampling.model_dump_json(exclude_defaults=True),
)
def test_frequencies_are_the_models_probabilities(sampling: Sampling, tokenizer: Any) -> None:
    """Every answer of one or two tokens, counted; two of the tokens end one."""
    model, prompt = tiny_model("qwen2", VOCAB, std=0.5), Asked((5, 7, 3))
    engine = Local(model, tokenizer, [0, 4], most=1000)
    found, ends = engine([prompt], DRAWS, sampling, 1), set(engine.stop_ids)
    expected: dict[tuple[int, ...], float] = {}
    with torch.inference_mode():
        for first, p in cut_and_tempered(model(torch.tensor([prompt.ids])).logits[0, -1], sampling).items():
            if first in ends:
                expected[first,] = p
                continue
            logits_V = model(torch.tensor([[*prompt.ids, first]])).logits[0, -1]
            expected |= {(first, second): p * q for second, q in cut_and_tempered(logits_V, sampling).items()}
    assert sum(expected.values()) == pytest.approx(1)
    counts = Counter(tuple(one.ids) for one in found)
    assert counts.keys() <= expected.keys()
    for one in found[:200]:
        assert one.logp_N.sum() == pytest.approx(math.log(expected[tuple(one.ids)]), abs=2e-5)
    often = [ids for ids, p in expected.items() if p * DRAWS >= 5]
    observed = [*(counts[ids] for ids in often), sum(counts[ids] for ids in expected if ids not in often)]
    wanted = [*(expected[ids] * DRAWS for ids in often), DRAWS - sum(expected[ids] * DRAWS for ids in often)]
    if wanted[-1] < 1e-6:
        observed, wanted = observed[:-1], wanted[:-1]
    assert len(wanted) > 2
    assert chisquare(observed, wanted).pvalue > 1e-3


def test_empty_cut_and_stopped_answers_are_told_apart(tokenizer: Any) -> None:
    model, prompts = tiny_model("qwen2", len(tokenizer), std=0.2, eos=None), PROMPTS[:4]
    greedy = Sampling(temperature=0, max_new_tokens=6)
    model.generation_config.eos_token_id = None
    found = Local(model, tokenizer, [])(prompts, 1, greedy, 0)
    assert [(len(one.ids), one.finished) for one in found] == [(6, False)] * 4
    first, last = found[0].ids[0], found[1].ids[5]
    assert first not in found[1].ids
    assert last not in found[1].ids[:5]
    for ends in ([first], [first, last]):
        model.generation_config.eos_token_id = ends[1:]  # a model has ends of its own
        one, other, *_ = Local(model, tokenizer, ends[:1])(prompts, 1, greedy, 0)
        assert (one.ids, one.text, one.finished, one.logp_N.shape) == ([first], "", True, (1,))
        assert other.ids == found[1].ids
        assert other.finished is (last in ends)  # an end at the last place is an end
        assert other.text == tokenizer.decode(other.ids[:5] if last in ends else other.ids).strip()
    one_token = Local(model, tokenizer, [first])(prompts, 1, Sampling(temperature=0, max_new_tokens=1), 0)
    assert [one.finished for one in one_token] == [one.ids[0] == first for one in one_token]


def test_bf16_log_probabilities_are_the_trainers_under_autocast_and_kept_in_float32(tokenizer: Any) -> None:
    model = tiny_model("qwen2", len(tokenizer), std=0.2)
    found = asked(model, tokenizer, precision="bf16")
    pairs = [(PROMPTS[one.prompt].ids, one.ids) for one in found]
    exact = torch.cat(sequence_logp(model, pairs))
    with torch.autocast("cpu", torch.bfloat16):
        trainer = torch.cat(sequence_logp(model, pairs))
        inside = asked(model, tokenizer)
        told_off = asked(model, tokenizer, precision="fp32")
    ours = torch.from_numpy(np.concatenate([one.logp_N for one in found]))
    rounding = (trainer - exact).abs()
    assert rounding.max() > 1e-3  # autocast has had its part
    assert (ours - exact).abs().max() > 1e-3
    assert (ours - trainer).abs().max() < 2 * rounding.max()
    assert (ours - trainer).abs().mean() < 1.5 * rounding.mean()
    assert ours.dtype == torch.float32
    assert not torch.equal(ours, ours.bfloat16().float())
    assert [one.ids for one in inside] == [one.ids for one in found]  # as the context is
    assert [one.ids for one in told_off] == [one.ids for one in asked(model, tokenizer)]


def test_training_after_sampling_under_autocast_has_the_gradients_of_training_alone(tokenizer: Any) -> None:
    ids_BT = torch.tensor([PROMPTS[1].ids])

    def gradients(sampled: bool) -> list[Any]:
        model = tiny_model("qwen2", len(tokenizer)).train()
        with torch.autocast("cpu", torch.bfloat16):
            if sampled:
                asked(model, tokenizer)
            loss = model(ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    for alone, after in zip(gradients(False), gradients(True), strict=True):
        assert after is not None
        assert torch.equal(alone, after)


def test_progress_moves_with_every_token_although_all_answers_end_together(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Progress, "LINE_EVERY_S", 0.0)
    model = tiny_model("qwen2", len(tokenizer), eos=None)
    progress = Progress("lines")
    for _ in range(2):  # a second round counts from the beginning
        with progress.stage("rl", "grpo"):
            engine = Local(model, tokenizer, [])
            engine.stop_ids = []  # nothing ends before its last token
            engine(PROMPTS, 2, SAMPLING, 3, lambda done, total: progress.update(done, total, "answers", tick="token"))
        told = [line.split("answers ")[1].split("  left")[0] for line in capsys.readouterr().err.splitlines()[1:]]
        assert told == [f"{0 if n < 16 else 12}/12  token {n}" for n in range(1, 17)]
