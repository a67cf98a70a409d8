"""Rows that enter, leave and grow beside each other: at every token the model answers as it would on that row alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from tiny_parts import tiny_model
from torch import Tensor

from potstill.edges.checked import cache_name
from potstill.edges.decoding import Batch, draw_answers, undisturbed
from potstill.edges.drawing import Drawing
from potstill.edges.rooms import BLOCK

VOCAB, STOP, SAMPLES = 64, 0, 3
NEW = 2 * BLOCK + 10
PROMPTS = [tuple(range(3, 3 + length)) for length in (4, 45, 9, 30, 4, 1)]  # the fifth is the first one again
SLIDES = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "gpt2": {},
    "mistral": {"sliding_window": 20},  # the prompts are on both sides of it
    "gemma3_text": SLIDES,
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, **SLIDES},
}
PLACES = 1024  # a row's number and a position are told by the number that draws


@dataclass(frozen=True)
class Dictated(Drawing):
    """Takes tokens and lengths of our own choice, and notes the logits of each row and position."""

    temperature: float = 1.0
    answers: Sequence[Sequence[int]] = ()
    seen: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def __call__(self, logits_BV: Tensor, u_B: Tensor | None, scored: bool = True) -> tuple[Tensor, Tensor | None]:
        assert u_B is not None
        tokens = []
        for logits_V, u in zip(logits_BV, u_B.tolist(), strict=True):
            row, position = divmod(round(u * PLACES**2), PLACES)
            tokens.append(self.answers[row - 1][position] if row else STOP)
            if row:  # else one that has ended
                assert (row - 1, position) not in self.seen
                self.seen[row - 1, position] = logits_V.clone()
        return torch.tensor(tokens), torch.zeros(len(tokens))


@pytest.mark.parametrize("most", [2, 5, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_after_joins_leaves_and_growth_are_those_of_a_row_alone(family: str, most: int) -> None:
    chosen = np.random.default_rng(most)
    lengths = chosen.permutation([1, 2, 5, BLOCK - 1, BLOCK, BLOCK + 1, NEW, NEW, *chosen.integers(1, NEW, 10)])
    answers = [[*chosen.integers(1, VOCAB, n - 1).tolist(), STOP] for n in lengths]
    model, drawing = tiny_model(family, VOCAB, std=0.2, **FAMILIES[family]), Dictated(answers=answers)

    def uniform(i: int, s: int) -> np.ndarray:
        return ((i * SAMPLES + s + 1) * PLACES + np.arange(NEW)) / PLACES**2

    found = draw_answers(
        model,
        PROMPTS,
        samples=SAMPLES,
        stop_ids=[STOP],
        max_new_tokens=NEW,
        drawing=drawing,
        uniform=uniform,
        most=most,
    )
    assert [each.ids for of_prompt in found for each in of_prompt] == answers
    for row, answer in enumerate(answers):
        prompt = PROMPTS[row // SAMPLES]
        with torch.inference_mode():
            alone_TV = model(torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
        seen_TV = torch.stack([drawing.seen[row, position] for position in range(len(answer))])
        torch.testing.assert_close(seen_TV, alone_TV, atol=1e-5, rtol=0)


@pytest.mark.parametrize("samples", [1, 5, 30])
@pytest.mark.parametrize("most", [4, 64])
def test_a_prompt_is_read_once_however_many_its_samples(samples: int, most: int) -> None:
    model, read, steps = tiny_model("qwen2", VOCAB), list[int](), [0]

    def watch(module: Any, args: Any, named: dict[str, Any]) -> None:
        width = named["input_ids"].shape[1]
        if width > 1:
            read.extend(named["attention_mask"].sum(-1).tolist())
        else:
            steps[0] += 1

    prompts = [prompt for prompt in PROMPTS if len(prompt) > 1]
    with model.register_forward_pre_hook(watch, with_kwargs=True):
        draw_answers(
            model,
            prompts,
            samples=samples,
            stop_ids=[],
            max_new_tokens=3,
            drawing=Drawing(1.0),
            uniform=lambda i, s: np.random.default_rng([i, s]).random(3),
            most=most,
        )
    assert sorted(read) == sorted(len(prompt) for prompt in set(prompts))
    rows = len(prompts) * samples
    assert steps[0] == 2 * -(-rows // most)  # the last token is not read, and places in flight are never empty


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_keys_that_are_cast_once_give_the_bits_of_those_that_are_cast_at_every_token(family: str) -> None:
    model = tiny_model(family, VOCAB, std=0.2, **FAMILIES[family]).requires_grad_(True)
    own = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    answer = torch.arange(1, 2 * BLOCK) % VOCAB
    with torch.autocast("cpu", torch.bfloat16):
        with undisturbed(model):
            batch = Batch(model, [PROMPTS[1]])
            ours = [batch.logits_BV]
            for token in answer:
                batch.step(token[None], torch.tensor([True]))
                ours.append(batch.logits_BV)
        with torch.no_grad():
            out = model(torch.tensor([PROMPTS[1]]), use_cache=True, logits_to_keep=1)
            plain = [out.logits[:, -1].float()]
            for token in answer:
                out = model(token[None, None], **{cache_name(model): out.past_key_values}, use_cache=True)
                plain.append(out.logits[:, -1].float())
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)} == own


def test_weights_that_were_cast_are_back_after_an_error() -> None:
    model = tiny_model("qwen2", VOCAB).requires_grad_(True)
    before = [*model.parameters()]

    def fail() -> None:
        with undisturbed(model):
            assert any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
            raise ZeroDivisionError

    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ZeroDivisionError):
        fail()
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
