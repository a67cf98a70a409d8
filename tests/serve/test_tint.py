"""Divergences of an answer's tokens, against the definition."""

import pytest
import torch

from potstill.core.errors import UserError
from potstill.core.types import Example
from potstill.data.prompts import Prompts
from potstill.serve import tint


def loaded(pair):
    from potstill.edges.models import load_model

    return [load_model(offer.where) for offer in pair]


def test_divergences_are_those_of_the_definition(pair):
    student, teacher = loaded(pair)
    prompt, answer = [5, 9, 30, 31], [40, 41, 42, 7]
    with torch.inference_mode():
        p, q = (model(torch.tensor([[*prompt, *answer]])).logits[0, 3:7].double().softmax(-1) for model in (teacher, student))
    wanted = (p * (p / q).log()).sum(-1)
    found = tint.divergences(student, teacher, prompt, answer, p.shape[-1])
    assert found == pytest.approx(wanted.tolist(), abs=1e-5)
    assert tint.divergences(student, student, prompt, answer, p.shape[-1]) == pytest.approx([0] * 4, abs=1e-7)


def test_pieces_carry_the_largest_of_their_tokens(tokenizer):
    from potstill.edges.tokens import encode

    ids = encode(tokenizer, "a😀b")
    nats = [float(n) for n in range(len(ids))]
    found = tint.tint_of(tokenizer, frozenset(), ids, nats, "")
    assert "".join(text for text, _ in found.pieces) == "a😀b"
    assert found.pieces == [("a", 0.0), ("😀", float(len(ids) - 2)), ("b", float(len(ids) - 1))]
    assert found.mean == sum(nats) / len(nats)


def test_other_tokenizers_are_not_compared(tokenizer):
    from family import build_tokenizer

    other = build_tokenizer(["completely other words", "and nothing else"])
    with pytest.raises(UserError, match="different tokenizers"):
        tint.compared(tokenizer, other, Prompts(), Example("", "x", "x"))
    assert tint.compared(tokenizer, tokenizer, Prompts(), Example("", "x", "x")) == (len(tokenizer), "")


def test_tokens_that_are_not_all_known_are_cut_again_and_that_is_said(tokenizer):
    from potstill.edges.tokens import encode

    assert tint.tokens_of(tokenizer, [40, 41], True, "other") == ([40, 41], "")
    found, note = tint.tokens_of(tokenizer, [40, 41], False, "a b")
    assert (found, note) == (encode(tokenizer, "a b"), "the answer was cut into tokens again")
    with pytest.raises(UserError, match="the answer is empty"):
        tint.tokens_of(tokenizer, [], True, "")
