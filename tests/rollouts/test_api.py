"""The OpenAI engine against a server that fails on purpose: what is tried again, what ends at once, what is told."""

import threading
import time
from typing import Any

import numpy as np
import pytest
from faulty import KEY, Reply, chat, error, serving
from pydantic import ValidationError

from potstill.core.errors import UserError
from potstill.core.types import Turn
from potstill.data.rollout import Asked, Engine, Rollout, Sampling
from potstill.rollouts.api import OpenAI, TooLong
from potstill.rollouts.crew import Crew, Stop, Stopped

HELLO = Asked(turns=(Turn("system", "Be brief."), Turn("user", "Hello?")))
GREEDY = Sampling(temperature=0, max_new_tokens=8)


def engine(url: str, **more: Any) -> OpenAI:
    return OpenAI(**({"url": url, "model": "teacher", "backoff_s": 0.001, "retries": 2, "timeout_s": 5.0} | more))


def ask(engine: Engine, *prompts: Asked, samples: int = 1, sampling: Sampling = GREEDY, seed: int = 7) -> list[Rollout]:
    return engine(prompts or (HELLO,), samples, sampling, seed)


def test_a_chat_is_asked_and_read() -> None:
    with serving(lambda n, body: chat(" Hi there \n")) as server:
        (found,) = ask(engine(server.url))
    assert (found.text, found.finished, found.ids, found.logp_N.size) == ("Hi there", True, [], 0)
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.answer_tokens) == (3, 2)
    ((path, body),) = server.asked
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    sent = {name: body[name] for name in ("model", "max_tokens", "temperature", "top_p", "top_k", "min_p")}
    assert sent == {"model": "teacher", "max_tokens": 8, "temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0}
    assert server.keys == [None]


@pytest.mark.parametrize(
    "asked, prompt", [(Asked(ids=(5, 6)), [5, 6]), (Asked(text="Once"), "Once"), (Asked(ids=(5,), text="Once"), "Once")]
)
def test_a_prompt_without_turns_is_continued(asked: Asked, prompt: Any) -> None:
    said = {"choices": [{"text": " upon", "finish_reason": "length"}]}
    with serving(lambda n, body: said) as server:
        (found,) = ask(engine(server.url), asked)
    assert server.asked[0][0] == "/v1/completions"
    assert server.asked[0][1]["prompt"] == prompt
    assert (found.text, found.finished) == ("upon", False)
    assert found.usage is not None
    assert found.usage.answer_tokens is None  # the server does not say, and nothing is guessed


def test_samples_lie_beside_each_other_and_have_seeds_of_their_own() -> None:
    prompts = [Asked(turns=(Turn("user", text),)) for text in "aba"]
    with serving(lambda n, body: chat(f"{body['messages'][0]['content']}{body['seed']}")) as server:
        found = ask(engine(server.url), *prompts, samples=2, sampling=Sampling())
        again = ask(engine(server.url), *prompts, samples=2, sampling=Sampling())
        other = ask(engine(server.url), *prompts, samples=2, sampling=Sampling(), seed=8)
    assert [one.prompt for one in found] == [0, 0, 1, 1, 2, 2]
    assert [one.text[0] for one in found] == [*"aabbaa"]
    texts = [one.text for one in found]
    assert len(set(texts)) == 6  # the prompt that occurs again counts on
    assert [one.text for one in again] == texts
    assert not {one.text for one in other} & set(texts)


def test_at_most_so_many_requests_are_open() -> None:
    three = threading.Barrier(3)

    def answer(n: int, body: dict[str, Any]) -> Reply:
        three.wait(timeout=30)
        return Reply(chat("x"), delay_s=0.02)

    with serving(answer) as server:
        ask(engine(server.url, in_flight=3), samples=12, sampling=Sampling())
    assert server.most == 3


@pytest.mark.parametrize("with_key", [False, True])
def test_the_key_goes_into_the_header_alone(monkeypatch: pytest.MonkeyPatch, with_key: bool) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with serving(lambda n, body: chat("x")) as server:
        one = engine(server.url, key_env="TEACHER_KEY" if with_key else None)
        ask(one)
    assert server.keys == [f"Bearer {KEY}" if with_key else None]
    assert KEY not in f"{one.model_dump_json()}{one!r}{server.asked}"


def test_without_a_key_in_the_environment_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", " ")
    with serving(lambda n, body: chat("x")) as server, pytest.raises(UserError, match="variable TEACHER_KEY is not set"):
        ask(engine(server.url, key_env="TEACHER_KEY"))
    assert not server.asked


PASSING = {
    "429": Reply(error("slow down"), 429, {"Retry-After": "0"}),
    "500": Reply(error("oops"), 500),
    "503 without a body": Reply(b"", 503),
    "half a body": Reply(chat("x" * 500), sent=0.5),
    "nothing at all": Reply(chat("x"), sent=0.0),
    "garbage": Reply(b"<html>busy</html>"),
    "not UTF-8": Reply(b'{"choices": "\xff\xfe"}'),
    "another shape": Reply({"answer": 42}),
    "a list": Reply([1, 2]),
    "no choice": Reply({"choices": []}),
    "no text": Reply({"choices": [{"message": {}, "finish_reason": "stop"}]}),
    "no reason": Reply({"choices": [{"message": {"content": "x"}}]}),
    "an error that is no error": Reply(error("overloaded")),
    "too late": Reply(chat("x"), delay_s=0.6),
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(fault: str) -> None:
    with serving(lambda n, body: PASSING[fault] if n < 2 else chat("at last")) as server:
        (found,) = ask(engine(server.url, timeout_s=0.3))
    assert found.text == "at last"
    assert len(server.asked) == 3
    assert server.asked[0] == server.asked[2]  # the same request, its seed too


@pytest.mark.parametrize("fault", PASSING)
def test_what_does_not_pass_ends_with_one_error(fault: str) -> None:
    with serving(lambda n, body: PASSING[fault]) as server, pytest.raises(UserError, match=r"no usable answer in 2 tries: \w"):
        ask(engine(server.url, timeout_s=0.3, retries=1))
    assert len(server.asked) == 2


def test_no_server_is_an_error_of_words() -> None:
    with serving(lambda n, body: chat("x")) as server:
        pass
    with pytest.raises(UserError, match=r"no usable answer in one try: no connection \(Connection refused\)"):
        ask(engine(server.url, retries=0))


def test_the_wait_is_the_one_that_the_server_asks_for() -> None:
    with serving(lambda n, body: Reply(error("slow"), 429, {"Retry-After": "0.4"}) if n == 0 else chat("x")) as server:
        begun = time.monotonic()
        ask(engine(server.url, backoff_s=0))
        waited = time.monotonic() - begun
    assert waited >= 0.4


def test_a_wait_of_an_hour_is_told_instead_of_waited() -> None:
    reply = Reply(error("later"), 429, {"Retry-After": "3600"})
    with serving(lambda n, body: reply) as server, pytest.raises(UserError, match="asks to wait 3,600 s"):
        ask(engine(server.url))


ENDING = {
    "401": (Reply(error(f"bad key {KEY}"), 401), "HTTP 401.*TEACHER_KEY"),
    "403": (Reply(error(f"not with {KEY}"), 403), "forbids model 'teacher'"),
    "404": (Reply(error("model not found"), 404), "no model 'teacher' there.*model not found"),
    "quota": (Reply(error("pay", "insufficient_quota"), 429), "nothing is left of the account's quota"),
    "moved": (Reply(b"", 307, {"Location": "http://127.0.0.1:1/v1"}), "is somewhere else"),
    "top_k": (Reply(error("unknown field top_k"), 400), "set extensions = false"),
    "unfit": (Reply(error(f"no seeds, says {KEY}"), 400), "refuses the request.*no seeds"),
}


@pytest.mark.parametrize("fault", ENDING)
def test_what_cannot_pass_ends_at_once(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    reply, words = ENDING[fault]
    with serving(lambda n, body: reply) as server, pytest.raises(UserError, match=words) as caught:
        ask(engine(server.url, key_env="TEACHER_KEY"))
    assert len(server.asked) == 1
    assert KEY not in str(caught.value)


def test_one_that_cannot_pass_ends_those_that_wait() -> None:
    def answer(number: int, body: dict[str, Any]) -> Reply:
        if body["messages"][0]["content"] == "bad":
            return Reply(error("no"), 401, delay_s=0.05)
        return Reply(error("slow"), 429, {"Retry-After": "300"})

    prompts = [Asked(turns=(Turn("user", text),)) for text in ("wait", "bad", "wait")]
    with serving(answer) as server:
        with pytest.raises(UserError, match="HTTP 401"):
            ask(engine(server.url), *prompts)
        assert len(server.asked) == 3


@pytest.mark.parametrize("retries", [0, 3])
def test_after_a_failure_nothing_more_is_begun(retries: int) -> None:
    """Each request may cost money."""
    prompts = [Asked(turns=(Turn("user", str(i)),)) for i in range(200)]
    with serving(lambda n, body: Reply(error("no"), 401) if n == 5 else chat("x")) as server:
        with pytest.raises(UserError, match="HTTP 401"):
            ask(engine(server.url, in_flight=1, retries=retries), *prompts)
        assert len(server.asked) == 6


def test_calls_at_the_same_time_end_together_but_for_a_prompt_that_is_too_long() -> None:
    run = Stop()
    said = {"long": Reply(error("maximum context length is 8"), 400), "bad": Reply(error("no"), 401), "good": chat("x")}

    def one(text: str) -> Any:
        return engine(server.url)([Asked(turns=(Turn("user", text),))] * 2, 1, GREEDY, 0, stop=run)

    with serving(lambda n, body: said[body["messages"][0]["content"]]) as server:
        with pytest.raises(TooLong):
            one("long")
        assert not run
        assert [found.text for found in one("good")] == ["x", "x"]
        with pytest.raises(UserError, match="HTTP 401"):
            one("bad")
        assert run
        with pytest.raises(Stopped):
            one("good")
        assert [body["messages"][0]["content"] for _, body in server.asked].count("good") == 2  # of the call before


@pytest.mark.parametrize("words", ["maximum context length is 64 tokens", "exceeds the available context size"])
def test_a_prompt_that_is_too_long_is_told_apart(words: str) -> None:
    with serving(lambda n, body: Reply(error(words), 400)) as server, pytest.raises(TooLong, match="too long for 'teacher'"):
        ask(engine(server.url))


def test_a_crew_tells_why_it_stopped_and_hands_over_what_was_in_work() -> None:
    began, stop = [threading.Event() for _ in range(3)], Stop()

    def work(job: int) -> int:
        if job == 3:
            raise AssertionError("begun after a failure")
        began[job].set()
        if job == 1:
            assert all(event.wait(60) for event in began)
            raise UserError("because")
        assert stop.wait(60)
        return -job

    crew = Crew(work, 3, stop)
    for job in range(4):
        crew.give(job)
    found: list[tuple[int, int]] = []
    with pytest.raises(UserError, match="because"):
        found.extend(crew.take() for _ in range(4))
    assert {*found, *crew.rest()} == {(0, 0), (2, -2)}
    with pytest.raises(Stopped):
        crew.take()
    crew.close()


def test_cut_filtered_and_silent_answers() -> None:
    replies = [chat("a", "length"), chat("b", "content_filter"), chat(None, "tool_calls"), chat("\ud83d\ude00 \udc00")]
    prompts = [Asked(turns=(Turn("user", str(i)),)) for i in range(4)]
    with serving(lambda n, body: replies[int(body["messages"][0]["content"])]) as server:
        found = ask(engine(server.url), *prompts)
    assert [one.finished for one in found] == [False, False, False, True]
    assert [one.text for one in found] == ["a", "b", "", "\U0001f600 \ufffd"]


def reasoning(text: str | None, said: Any, name: str = "reasoning_content", **more: Any) -> dict[str, Any]:
    found = chat(text, **more)
    found["choices"][0]["message"][name] = said
    return found


def test_reasoning_is_no_part_of_an_answer_and_is_told() -> None:
    """Nor are log-probabilities that may be of both."""
    logprobs = {"content": [{"logprob": -0.5}]}
    replies = [
        reasoning("4", "2 + 2 …", logprobs=logprobs),
        reasoning(None, "2 + 2 …", "reasoning", ended="length"),
        reasoning("5", "", logprobs=logprobs),
        reasoning("6", None, logprobs=logprobs),
    ]
    prompts = [Asked(turns=(Turn("user", str(i)),)) for i in range(4)]
    with serving(lambda n, body: replies[int(body["messages"][0]["content"])]) as server:
        found = engine(server.url, logprobs=True)(prompts, 1, Sampling(), 0)
    assert [(one.text, one.reasoned, len(one.logp_N)) for one in found] == [
        ("4", True, 0),
        ("", True, 0),
        ("5", False, 1),
        ("6", False, 1),
    ]


LOGP = {"content": [{"logprob": -0.5}, {"logprob": -0.25}]}


@pytest.mark.parametrize(
    "said, sampling, known",
    [
        (LOGP, Sampling(), [-0.5, -0.25]),
        ({"token_logprobs": [-0.5, -0.25]}, Sampling(), [-0.5, -0.25]),
        (LOGP, GREEDY, [-0.5, -0.25]),  # the model's own, as those of the local engine
        (LOGP, Sampling(temperature=0.7), []),  # a server's figures are those of temperature 1, the draw is not
        (LOGP, Sampling(top_p=0.9), []),
        ({"content": [{"logprob": -0.5}, {"logprob": None}]}, Sampling(), []),
        ({"content": [{"logprob": -0.5}, {"logprob": -9999.0}]}, Sampling(), []),
        (None, Sampling(), []),
    ],
)
def test_log_probabilities_are_those_of_the_draw_or_none(said: Any, sampling: Sampling, known: list[float]) -> None:
    with serving(lambda n, body: chat("x", logprobs=said)) as server:
        (found,) = ask(engine(server.url, logprobs=True), sampling=sampling)
    assert found.logp_N.tolist() == known
    assert found.logp_N.dtype == np.float32
    assert ("logprobs" in server.asked[0][1]) is (sampling in (Sampling(), GREEDY))


def test_the_form_that_openai_wants() -> None:
    with serving(lambda n, body: chat("x")) as server:
        one = engine(server.url, extensions=False)
        ask(one)
        with pytest.raises(UserError, match="extensions = true"):
            ask(one, sampling=Sampling(top_k=5))
    ((_, body),) = server.asked
    assert body["max_completion_tokens"] == 8
    assert not {"top_k", "min_p", "max_tokens"} & set(body)


@pytest.mark.parametrize(
    "url, words",
    [
        ("127.0.0.1:8080/v1", "must begin with http"),
        ("https://user:secret@host/v1", "must hold no key"),
        ("https://host/v1?key=secret", "must hold no key"),
        ("https://host/v1/chat/completions", "leave '/chat/completions' out"),
    ],
)
def test_addresses_that_are_none(url: str, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        OpenAI(url=url, model="m")
