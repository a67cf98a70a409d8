"""Answers that are continued together are those that each would have been alone."""

import asyncio
import threading

import pytest
from serving import answered

from potstill.edges.llamacpp_stream import Wish
from potstill.edges.tokens import decode
from potstill.serve.engine import Answer, End, EngineFailed
from potstill.serve.torch_engine import TorchEngine

PROMPTS = [[5, 6, 7], [40, 41], [9, 8, 7, 6, 5, 4], [33] * 12, [60, 61, 62]]


def answers(engine, seeds):
    """What the engine says to all prompts when they come at once."""
    ended = [threading.Event() for _ in PROMPTS]
    found: list[list[int]] = [[] for _ in PROMPTS]
    said: list[End] = []

    def hear(n, what):
        if isinstance(what, End):
            said.append(what)
            ended[n].set()
        else:
            found[n] += what.ids

    for n, prompt in enumerate(PROMPTS):
        engine.begin(prompt, Wish(8 + 4 * n, temperature=1.0, seed=seeds[n]), lambda what, n=n: hear(n, what))
    assert all(event.wait(30) for event in ended)
    return found, said


def one_by_one(engine, seeds):
    found = []
    for n, prompt in enumerate(PROMPTS):
        ids, end = [], threading.Event()
        engine.begin(
            prompt,
            Wish(8 + 4 * n, temperature=1.0, seed=seeds[n]),
            lambda what, ids=ids, end=end: end.set() if isinstance(what, End) else ids.extend(what.ids),
        )
        assert end.wait(30)
        found.append(ids)
    return found


@pytest.fixture
def engine(pair):
    from potstill.edges.models import load_model, load_tokenizer

    where = pair[0].where
    made = TorchEngine(load_model(where), load_tokenizer(where), stop_ids=[1], hidden=frozenset([1]), most=8, positions=256)
    yield made
    made.close()


@pytest.mark.parametrize("joins, moves", [(True, True), (False, True), (False, False)])
def test_together_and_alone_are_the_same(engine, monkeypatch, joins, moves):
    """Also of caches that other rows cannot join, and of those whose rows cannot be picked."""
    from potstill.edges import decoding

    real = decoding.in_rooms
    monkeypatch.setattr(decoding, "in_rooms", lambda cache, config: real(cache, config) and joins)
    monkeypatch.setattr(decoding, "can_be_reordered", lambda cache: moves)
    alone = one_by_one(engine, range(5))
    together, said = answers(engine, range(5))
    assert together == alone
    assert len({len(ids) for ids in alone}) > 2
    assert {end.reason for end in said} <= {"stop", "length"}


def test_what_fails_ends_its_own_answer_alone(engine):
    good, bad = threading.Event(), []
    done = threading.Event()
    engine.begin([5, 6], Wish(200), lambda what: good.set() if isinstance(what, End) and what.reason != "failed" else None)
    engine.begin([10**6], Wish(4), lambda what: (bad.append(what), done.set()))
    assert done.wait(30)
    assert good.wait(30)
    assert bad[0].reason == "failed"
    assert "IndexError" in bad[0].why
    assert engine.trouble() == ""


@pytest.fixture
def stopping(pair):
    """An engine that a quarter of all tokens stop."""
    from potstill.edges.models import load_model, load_tokenizer

    model, tokenizer = load_model(pair[0].where), load_tokenizer(pair[0].where)
    stops = [1, *range(2, len(tokenizer), 4)]
    made = TorchEngine(model, tokenizer, stop_ids=stops, hidden=frozenset([1]), most=8, positions=256)
    yield made, tokenizer, frozenset(stops)
    made.close()


def test_the_token_that_ends_an_answer_counts_and_is_not_one_of_its_tokens(stopping):
    engine, tokenizer, stops = stopping
    ends, known = set(), set()
    for seed in range(24):
        pieces, answer = answered(engine, PROMPTS[0], Wish(6, temperature=3.0, seed=seed))
        ends.add(answer.finish)
        known.add(answer.all_known)
        assert not stops & {*answer.ids}
        assert len(answer.ids) == answer.count - (answer.finish == "stop")
        assert decode(tokenizer, answer.ids, {1}) == "".join(pieces)
        assert answer.all_known == ("\ufffd" not in "".join(pieces))
    assert ends == {"stop", "length"}
    assert known == {True, False}  # some spell half a character


def test_a_tag_that_the_prompt_opened_waits_until_the_model_has_begun(engine):
    pieces, _ = answered(engine, PROMPTS[0], Wish(4), opened="<think>")
    assert (pieces[0], len(pieces) > 1) == ("<think>", True)
    heard = []

    async def hear(answer):
        async for piece in answer.pieces():
            heard.append(piece)

    with pytest.raises(EngineFailed):
        asyncio.run(hear(Answer(engine, [10**6], Wish(4), opened="<think>")))
    assert heard == []


def test_an_engine_whose_thread_has_ended_leaves_nobody_waiting(pair, tokenizer):
    from potstill.edges.models import load_model

    engine = TorchEngine(load_model(pair[0].where), tokenizer, stop_ids=[1], hidden=frozenset(), most=1, positions=64)
    engine.close()
    said = []
    engine.begin(PROMPTS[0], Wish(4), said.append)
    assert [(one.reason, one.why) for one in said] == [("failed", "the server is stopping")]


def test_a_tag_that_nothing_follows_is_still_shown(pair, tokenizer):
    from potstill.edges.models import load_model

    ids = range(len(tokenizer))
    engine = TorchEngine(load_model(pair[0].where), tokenizer, stop_ids=ids, hidden=frozenset(), most=1, positions=64)
    pieces, answer = answered(engine, PROMPTS[0], Wish(4), opened="<think>")
    engine.close()
    assert (pieces, answer.ids, answer.count, answer.finish) == (["<think>"], [], 1, "stop")


def test_no_two_threads_share_a_tokenizer(site):
    with site.state.shelf.tokenizer("student") as scoring, site.opened.tokenizing() as prompting:
        assert len({id(scoring), id(prompting), id(site.opened.engine._tokenizer)}) == 3
