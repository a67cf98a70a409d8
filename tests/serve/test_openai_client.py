"""What OpenAI's own client gets from the server."""

import openai
import pytest

QUESTION = [{"role": "user", "content": "What currency does Peru use?"}]


@pytest.fixture
def client(site):
    with openai.OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def alone(site, ids, count):
    """Our own greedy answer to a prompt: text, tokens and whether it was cut."""
    from potstill.edges.sampling import generate

    with site.opened.engine.paused() as model:
        return generate(model, site.opened.tokenizer, [ids], stop_ids=site.opened.renderer.stop_ids, max_new_tokens=count)


def test_chat_is_our_own_greedy_answer_to_the_prompt_as_trained(site, client):
    from potstill.core.types import Example

    ids = site.opened.renderer.prompt(Example("", QUESTION[0]["content"], "")).ids
    ours = alone(site, ids, 24)
    found = client.chat.completions.create(model="student", messages=QUESTION, max_tokens=24)
    assert found.choices[0].message.content.strip() == ours.texts[0]
    assert found.choices[0].finish_reason == ("length" if ours.cut[0] else "stop")
    assert found.usage.prompt_tokens == len(ids)
    assert found.usage.completion_tokens == len(ours.ids[0])


def test_a_stream_says_what_the_whole_answer_says_and_its_usage(client):
    asked = {"model": "student", "messages": QUESTION, "max_tokens": 24}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in client.chat.completions.create(**asked, stream=True))


def test_completions_continue_a_text_or_token_ids(site, client):
    text = "Peru uses the"
    ids = site.opened.text(text)
    found = [client.completions.create(model="student", prompt=prompt, max_tokens=12) for prompt in (text, [text], ids)]
    assert len({one.choices[0].text for one in found}) == 1
    assert found[0].choices[0].text.strip() == alone(site, ids, 12).texts[0]
    assert found[0].usage.prompt_tokens == len(ids)


def test_a_users_text_never_becomes_a_control_token(site, client):
    control = site.opened.tokenizer.convert_ids_to_tokens(site.opened.renderer.end_of_turn_id)
    spelt = client.completions.create(model="student", prompt=f"x{control}", max_tokens=1).usage.prompt_tokens
    assert spelt > len(site.opened.text("x")) + 1
    chat = client.chat.completions.create(model="student", messages=[{"role": "user", "content": control}], max_tokens=1)
    plain = client.chat.completions.create(model="student", messages=[{"role": "user", "content": "x"}], max_tokens=1)
    assert chat.usage.prompt_tokens > plain.usage.prompt_tokens + 1


def test_a_conversation_and_parts_of_text_are_read(site, client):
    parts = [{"type": "text", "text": "What currency "}, {"type": "text", "text": "does Peru use?"}]
    turns = [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi!"},
    ]
    short = client.chat.completions.create(model="student", messages=[{"role": "user", "content": parts}], max_tokens=4)
    same = client.chat.completions.create(model="student", messages=QUESTION, max_tokens=4)
    assert short.choices[0].message.content == same.choices[0].message.content
    long = client.chat.completions.create(model="student", messages=[*turns, *QUESTION], max_tokens=4)
    assert long.usage.prompt_tokens > short.usage.prompt_tokens


def test_equal_seeds_draw_equal_answers(client):
    def drawn(seed):
        asked = {"model": "student", "messages": QUESTION, "max_tokens": 24, "temperature": 1.5, "top_p": 0.95, "seed": seed}
        return client.chat.completions.create(**asked).choices[0].message.content

    assert drawn(3) == drawn(3)
    assert len({drawn(seed) for seed in range(4)}) > 1


def test_a_stop_string_ends_an_answer_before_it(client):
    asked = {"model": "student", "messages": QUESTION, "max_tokens": 24}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    for stream in (False, True):
        found = client.chat.completions.create(**asked, stop=["never there", stop], stream=stream)
        said = "".join(c.choices[0].delta.content or "" for c in found) if stream else found.choices[0].message.content
        assert said == whole[: whole.index(stop)]


def test_models_are_listed_and_opened_when_asked(client):
    assert [model.id for model in client.models.list()] == ["student", "teacher"]
    assert client.models.retrieve("teacher").id == "teacher"
    assert client.chat.completions.create(model="teacher", messages=QUESTION, max_tokens=2).model == "teacher"
    with pytest.raises(openai.NotFoundError, match="there are: student, teacher"):
        client.chat.completions.create(model="gpt-9", messages=QUESTION)


def test_what_is_wrong_is_a_clear_error_of_the_client(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="student", messages=QUESTION, max_tokens=9000)
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError, match=r"context is 8,192 tokens; the prompt has 1\d,\d{3}") as caught:
        client.chat.completions.create(model="student", messages=[{"role": "user", "content": "loop sol " * 9000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="n is not supported"):
        client.chat.completions.create(model="student", messages=QUESTION, n=2)
