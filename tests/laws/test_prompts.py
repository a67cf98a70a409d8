"""The training prompt is the inference prompt, and prompt + answer is what the template writes, token for token."""

import copy
import datetime
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import habits
import pytest
from habits import tokenizer_with, with_bos
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_parts import chat_tokenizer, gpt2_tokenizer

from potstill.core.errors import UserError
from potstill.core.types import Example, Turn
from potstill.data.exported import exported_template
from potstill.data.prompts import Prompts, Renderer, end_of_turn, template_problems
from potstill.data.store import Counts, instruction_pairs, text_pairs
from potstill.data.templates import LeftOut
from potstill.edges.sampling import decode
from potstill.edges.tokens import encode, turn_tokens

QUESTION = Example("k", "What is 1+1?", "2")
THOUGHT = Example("k", "What is 1+1?", "<think>\n1 and 1.\n</think>\n\n2")
LATER = replace(
    QUESTION, history=(Turn("user", "Hi"), Turn("assistant", "<think>\nhm\n</think>\n\nHello")), instruction="And 2+2?"
)
ROOM = {"max_tokens": 2000, "max_prompt_tokens": 1500}


def messages_of(example: Example, system: str | None = None) -> list[dict[str, str]]:
    turns = [*example.history, Turn("user", example.instruction)]
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": turn.role, "content": turn.content} for turn in turns]


def theirs(tokenizer: Any, messages: list[dict[str, str]], generate: bool, **more: Any) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate, **more)
    return tokenizer.encode(text, add_special_tokens=False)


def obeys(tokenizer: Any, example: Example, row: Any, end: int, **more: Any) -> bool:
    """The law, by the template alone: its prompt, and its finished conversation up to the end of turn."""
    messages = messages_of(example)
    finished = theirs(tokenizer, [*messages, {"role": "assistant", "content": example.response}], False, **more)
    ours = [*row.prompt, *row.response]
    return row.prompt == theirs(tokenizer, messages, True, **more) and finished[: len(ours)] == ours and ours[-1] == end


@pytest.mark.parametrize(
    ("template", "example"),
    [
        (habits.CHATML, QUESTION),
        (habits.CHATML, THOUGHT),
        (habits.TRIMMED, QUESTION),
        (habits.TRIMMED, replace(QUESTION, instruction="  asked with room \n")),
        (habits.EMPTY_THOUGHT, THOUGHT),
        (habits.EMPTY_THOUGHT, replace(LATER, response=THOUGHT.response)),
        (habits.RAISES, QUESTION),
        (habits.NO_SYSTEM, QUESTION),
    ],
)
def test_a_row_is_the_templates_own_finished_conversation(template: str, example: Example) -> None:
    tokenizer = tokenizer_with(template)
    renderer = Renderer(tokenizer, Prompts())
    assert obeys(tokenizer, example, renderer.row(example), renderer.end_of_turn_id)
    assert template_problems(tokenizer, Prompts(), [example]) == []


def test_the_law_rejects_an_answer_whose_opened_tag_is_learned_twice() -> None:
    tokenizer = tokenizer_with(habits.EMPTY_THOUGHT)
    row = Renderer(tokenizer, Prompts()).row(THOUGHT)
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert not obeys(tokenizer, THOUGHT, replace(row, response=[think, *row.response]), row.response[-1])


@pytest.mark.parametrize(
    ("template", "prompts", "example", "words"),
    [
        (
            habits.EMPTY_THOUGHT,
            {},
            QUESTION,
            r'writes before an answer "<think>\\n\\n</think>\\n\\n".*prompts.answers = "template"',
        ),
        (
            habits.OPENS_THOUGHT,
            {},
            QUESTION,
            r'opens <think>.*prompts.thinking = "keep".*generation_prompt = "<\|im_start\|>assi',
        ),
        (habits.OPENS_THOUGHT, {}, THOUGHT, r"opens <think>"),
        (habits.OPENS_THOUGHT, {"answers": "row"}, THOUGHT, r"opens <think>"),
        (habits.OPENS_THOUGHT, {"thinking": "strip"}, QUESTION, r"opens <think>.*set prompts.generation_prompt"),
        (habits.NO_PROMPT, {}, QUESTION, r'add_generation_prompt.*generation_prompt = "<\|im_start\|>assistant\\n"'),
        (
            habits.OTHER_HEADER,
            {},
            QUESTION,
            r'otherwise than its generation prompt.*answers = "row".*generation_prompt = "<\|im',
        ),
        (habits.NO_ANSWERS, {}, QUESTION, r'leaves out what the assistant says.*prompts.answers = "row"'),
        (habits.TRIMMED, {}, replace(QUESTION, response="2 \n"), r'trims answers.*prompts.answers = "template"'),
        (habits.UPPER, {}, replace(QUESTION, response="two"), r"changes an answer's text"),
        (habits.NO_SYSTEM, {"system": "Be a pirate."}, QUESTION, r'the system text.*prompts.system_turn = "user"'),
        (habits.NO_SYSTEM, {}, replace(QUESTION, history=(Turn("system", "Ahoy"),)), r"the system text.*system_turn"),
        (habits.RAISES, {"system": "Be a pirate."}, QUESTION, r"System role not supported.*system_turn"),
        (habits.RAISES, {}, replace(QUESTION, history=(Turn("system", "Ahoy"),)), r"System role not supported.*system_turn"),
        (habits.DATED, {}, QUESTION, r'set prompts.date = "\d{4}-\d\d-\d\d"'),
    ],
)
def test_a_habit_is_refused_with_the_field_that_resolves_it(
    template: str, prompts: dict[str, Any], example: Example, words: str
) -> None:
    tokenizer = tokenizer_with(template)
    with pytest.raises(UserError, match=words):
        Renderer(tokenizer, Prompts(**prompts)).row(example)
    (problem,) = template_problems(tokenizer, Prompts(**prompts), [example])
    with pytest.raises(UserError, match=words):
        raise UserError(problem)


def test_only_the_row_that_reveals_a_habit_is_named() -> None:
    rows = [QUESTION] * 60 + [replace(QUESTION, history=(Turn("system", "Ahoy"),))]
    (problem,) = template_problems(tokenizer_with(habits.RAISES), Prompts(), rows)
    assert problem.endswith("[1 row]")


HEADER = "<|im_start|>assistant\n"
END = "<|im_end|>\n" + HEADER
WHICH = habits.CHATML + "{{ 'yes' if enable is true else 'no' }}"


@pytest.mark.parametrize(
    ("template", "prompts", "example", "ends_in", "learned"),
    [
        (habits.EMPTY_THOUGHT, {"answers": "template"}, QUESTION, HEADER, "<think>\n\n</think>\n\n2<|im_end|>"),
        (habits.EMPTY_THOUGHT, {"answers": "row"}, QUESTION, HEADER, "2<|im_end|>"),
        (habits.EMPTY_THOUGHT, {"thinking": "strip", "answers": "row"}, THOUGHT, HEADER, "2<|im_end|>"),
        (habits.OPENS_THOUGHT, {"thinking": "keep"}, THOUGHT, HEADER + "<think>\n", "1 and 1.\n</think>\n\n2<|im_end|>"),
        (habits.OPENS_THOUGHT, {"generation_prompt": HEADER}, QUESTION, HEADER, "2<|im_end|>"),
        (habits.OPENS_THOUGHT, {"generation_prompt": HEADER, "thinking": "strip"}, THOUGHT, HEADER, "2<|im_end|>"),
        (habits.NO_PROMPT, {"generation_prompt": HEADER}, QUESTION, HEADER, "2<|im_end|>"),
        (habits.OTHER_HEADER, {"answers": "row"}, QUESTION, "<|im_start|>A\n", "2<|im_end|>"),
        (habits.OTHER_HEADER, {"generation_prompt": HEADER}, QUESTION, HEADER, "2<|im_end|>"),
        (habits.NO_ANSWERS, {"answers": "row"}, QUESTION, HEADER, "2<|im_end|>"),
        (habits.TRIMMED, {"answers": "template"}, replace(QUESTION, response=" 2 \n"), HEADER, "2<|im_end|>"),
        (habits.TRIMMED, {"answers": "row"}, replace(QUESTION, response="2 \n"), HEADER, "2 \n<|im_end|>"),
        (habits.UPPER, {"answers": "template"}, replace(QUESTION, response="two"), HEADER, "TWO<|im_end|>"),
        (habits.NO_SYSTEM, {"system": "S.", "system_turn": "user"}, QUESTION, "user\nS.\n\nWhat is 1+1?" + END, "2<|im_end|>"),
        (habits.DATED, {"date": "2026-11-28"}, QUESTION, HEADER, "2<|im_end|>"),
    ],
)  # fmt: skip
def test_a_field_says_what_is_learned(
    template: str, prompts: dict[str, Any], example: Example, ends_in: str, learned: str
) -> None:
    tokenizer = tokenizer_with(template)
    row = Renderer(tokenizer, Prompts(**prompts)).row(example)
    assert tokenizer.decode(row.prompt).endswith(ends_in)
    assert tokenizer.decode(row.response) == learned
    assert template_problems(tokenizer, Prompts(**prompts), [example]) == []


def test_a_plain_answer_is_never_learned_inside_an_opened_thought() -> None:
    counts = Counts()
    renderer = Renderer(tokenizer_with(habits.OPENS_THOUGHT), Prompts(thinking="keep"))
    assert len(list(instruction_pairs([QUESTION, THOUGHT], renderer, counts))) == 1
    assert counts.dropped == {"no reasoning, where the prompt opens <think>": 1}


def test_reasoning_of_earlier_turns_is_the_templates_affair_or_stripped() -> None:
    tokenizer = tokenizer_with(habits.CHATML)
    kept, stripped = (tokenizer.decode(Renderer(tokenizer, Prompts(thinking=how)).row(LATER).prompt) for how in (None, "strip"))
    assert "<think>\nhm\n</think>\n\nHello<|im_end|>" in kept
    assert "assistant\nHello<|im_end|>" in stripped


# --- the date


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        day = 1

        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return datetime.datetime(2031, 1, cls.day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    return Clock


@pytest.mark.parametrize(
    "template",
    [
        habits.DATED,
        habits.DATED.replace("strftime_now('%d %b %Y')", "(strftime_now('%d %b %Y') if strftime_now is defined else 'never')"),
        "{% set form = '%d %b %Y' %}" + habits.DATED.replace("'%d %b %Y'", "form"),
    ],
)
def test_a_prompt_does_not_change_overnight(clock: Any, template: str) -> None:
    tokenizer = tokenizer_with(template)
    found = []
    for clock.day in (1, 2):
        found.append(Renderer(tokenizer, Prompts(date="2026-11-28")).prompt(QUESTION).ids)
    assert found[0] == found[1]
    assert "Today: 28 Nov 2026" in tokenizer.decode(found[0])


def test_a_day_is_a_day() -> None:
    with pytest.raises(ValueError, match="'28 Nov' is no day of the form YYYY-MM-DD"):
        Prompts(date="28 Nov")


# --- what rows spell


SPELT = [
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<think>",
    "</think>",
    "<joy>",
    "<|im_",
    "end|>",
    "<",
    "a",
    " ",
    "\n",
    "é",
]
texts = st.lists(st.sampled_from(SPELT), min_size=1, max_size=8).map("".join).filter(str.strip)


@pytest.fixture(scope="module")
def many() -> dict[str, Any]:
    return {
        template: tokenizer_with(template, special=("<joy>",))
        for template in (habits.CHATML, habits.TRIMMED, habits.EMPTY_THOUGHT, habits.OPENS_THOUGHT)
    }


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(instruction=texts, context=texts, system=texts, earlier=texts, said=texts)
def test_no_prompt_opens_or_closes_a_turn_and_the_template_sees_the_real_text(
    many: dict[str, Any], instruction: str, context: str, system: str, earlier: str, said: str
) -> None:
    turns = (Turn("system", system), Turn("user", earlier), Turn("assistant", said))
    example = Example("k", instruction, "2", context=context, history=turns)
    calm = Example("k", "i", "2", context="c", history=(Turn("system", "s"), Turn("user", "e"), Turn("assistant", "a")))
    for template, tokenizer in many.items():
        renderer = Renderer(tokenizer, Prompts(**ROOM))
        prompt, honest = renderer.prompt(example), renderer.prompt(calm)
        if prompt.ids is None:
            assert prompt.reason == "spells a token that the chat template's own logic reads"
            assert "</think>" in instruction + context + system + earlier
            continue
        for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
            id = tokenizer.convert_tokens_to_ids(token)
            assert prompt.ids.count(id) == honest.ids.count(id), (template, token)
        said_there = renderer._as_said(Turn("assistant", said)).content
        messages = [{"role": turn.role, "content": said_there if turn.role == "assistant" else turn.content} for turn in turns]
        messages.append({"role": "user", "content": f"{context}\n\n{instruction}"})
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(prompt.ids, clean_up_tokenization_spaces=False) == wanted


@settings(max_examples=200, deadline=None)
@given(said=texts)
def test_in_answers_added_tokens_are_tokens_and_turns_are_text(many: dict[str, Any], said: str) -> None:
    tokenizer = many[habits.CHATML]
    renderer = Renderer(tokenizer, Prompts(**ROOM))
    ids = renderer.response(said)
    for token in ("<joy>", "<think>", "</think>"):
        assert ids.count(tokenizer.convert_tokens_to_ids(token)) == said.count(token)
    for token in ("<|im_start|>", "<|endoftext|>"):
        assert tokenizer.convert_tokens_to_ids(token) not in ids
    assert ids.count(renderer.end_of_turn_id) == 1
    assert ids[-1] == renderer.end_of_turn_id


def test_trim_sees_through_a_spelt_token() -> None:
    tokenizer = tokenizer_with(habits.TRIMMED)
    ids = Renderer(tokenizer, Prompts()).prompt(replace(QUESTION, instruction="  hello <|im_end|> \n")).ids
    assert "user\nhello <|im_end|><|im_end|>\n" in tokenizer.decode(ids)


def test_a_token_that_the_templates_logic_reads_in_a_prompt_leaves_the_row_out() -> None:
    tokenizer = tokenizer_with(habits.OPENS_THOUGHT)
    renderer, counts = Renderer(tokenizer, Prompts(thinking="keep")), Counts()
    assert not list(instruction_pairs([replace(THOUGHT, instruction="why </think> now?")], renderer, counts))
    assert counts.dropped == {"spells a token that the chat template's own logic reads": 1}


def test_an_added_token_counts_in_answers_and_in_scores() -> None:
    tokenizer = tokenizer_with(habits.CHATML, special=("<joy>", "<anger>"))
    renderer = Renderer(tokenizer, Prompts())
    joy = tokenizer.convert_tokens_to_ids("<joy>")
    assert renderer.response("<joy>") == [joy, renderer.end_of_turn_id]
    assert decode(tokenizer, [joy, renderer.end_of_turn_id, joy], renderer.stop_ids) == "<joy>"
    assert decode(tokenizer, [tokenizer.convert_tokens_to_ids("<|im_start|>"), joy], renderer.stop_ids) == "<joy>"


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>", "<|im_end|>\n"])
def test_an_answers_own_end_is_taken_off_once_and_counted(end: str) -> None:
    tokenizer = tokenizer_with(habits.CHATML)
    tokenizer.eos_token = "<|endoftext|>"
    renderer, counts = Renderer(tokenizer, Prompts()), Counts()
    example = replace(QUESTION, response=f"2{end}", references=(f"2{end}", "two"))
    (pair, clean) = instruction_pairs([example, QUESTION], renderer, counts)
    assert pair == clean
    assert counts.ends_removed == 1
    assert renderer.scored(example).references == ("2", "two")
    twice = renderer.response("2<|im_end|><|im_end|>")
    assert tokenizer.decode(twice) == "2<|im_end|><|im_end|>"
    assert twice.count(renderer.end_of_turn_id) == 1


def test_white_space_is_decoded_as_it_is() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    ids = tokenizer.encode("x != y , z . I 'm", add_special_tokens=False)
    assert decode(tokenizer, ids, []) == "x != y , z . I 'm"


# --- tools and reasoning


LOOK = ({"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}},)
OFFERED = ({"type": "function", "function": {"name": "weather", "description": "of a city"}},)
CALLED = (Turn("assistant", "", tool_calls=LOOK), Turn("tool", "20 °C", name="weather"))


def test_tools_and_their_calls_are_written_by_the_template() -> None:
    tokenizer = tokenizer_with(habits.TOOLS, added=("<think>", "</think>", "<tool_call>", "</tool_call>"))
    renderer = Renderer(tokenizer, Prompts(**ROOM))
    answered = renderer.row(replace(QUESTION, since=CALLED, tools=OFFERED))
    assert tokenizer.decode(answered.prompt) == (
        '<|im_start|>system\n{"type": "function", "function": {"name": "weather", "description": "of a city"}}\n<|im_end|>\n'
        "<|im_start|>user\nWhat is 1+1?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>weather{"city": "Lima"}</tool_call><|im_end|>\n'
        "<|im_start|>tool\n20 °C<|im_end|>\n<|im_start|>assistant\n"
    )
    example = replace(QUESTION, response="Let me look.", references=("Let me look.",), tool_calls=LOOK, tools=OFFERED)
    calling = renderer.row(example)
    wanted = 'Let me look.<tool_call>weather{"city": "Lima"}</tool_call>'
    assert tokenizer.decode(calling.response) == f"{wanted}<|im_end|>"
    assert tokenizer.convert_tokens_to_ids("<tool_call>") in calling.response
    assert renderer.scored(example).references == (wanted,)


def test_arguments_as_text_reach_a_template_that_joins_them() -> None:
    joined = habits.TOOLS.replace("call.function.arguments | tojson", "call.function.arguments")
    row = Renderer(tokenizer_with(joined), Prompts(**ROOM)).row(replace(QUESTION, since=CALLED))
    assert 'weather{"city": "Lima"}' in tokenizer_with(joined).decode(row.prompt)


def test_reasoning_kept_apart_is_learned_where_the_template_writes_it() -> None:
    tokenizer = tokenizer_with(habits.TOOLS)
    example = replace(QUESTION, reasoning="1 and 1")
    assert tokenizer.decode(Renderer(tokenizer, Prompts()).row(example).response) == "<think>1 and 1</think>2<|im_end|>"
    assert tokenizer.decode(Renderer(tokenizer, Prompts(thinking="strip")).row(example).response) == "2<|im_end|>"
    opening = tokenizer_with(habits.OPENS_THOUGHT)
    row = Renderer(opening, Prompts(thinking="keep")).row(example)
    assert opening.decode(row.response) == "1 and 1\n</think>\n\n2<|im_end|>"


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (replace(QUESTION, tools=OFFERED), "leaves out tools .*weather"),
        (replace(QUESTION, tool_calls=LOOK), "leaves out tool_calls .*weather"),
        (replace(QUESTION, since=CALLED), "leaves out tool_calls"),
        (replace(QUESTION, reasoning="1 and 1"), 'leaves out reasoning_content.*prompts.thinking = "strip"'),
        (replace(QUESTION, history=(Turn("user", "x"), Turn("assistant", "y", "z"))), "leaves out reasoning_content"),
    ],
)
def test_what_a_template_cannot_write_is_refused(example: Example, words: str) -> None:
    tokenizer = tokenizer_with(habits.CHATML)
    with pytest.raises(UserError, match=words):
        Renderer(tokenizer, Prompts(**ROOM)).row(example)
    assert len(template_problems(tokenizer, Prompts(**ROOM), [QUESTION, example])) == 1
    with pytest.raises(UserError, match="cannot write tools, tool calls and reasoning; use format = 'chat'"):
        Renderer(tokenizer, Prompts(format="alpaca", **ROOM)).row(example)


@settings(max_examples=60, deadline=None)
@given(spelt=texts)
def test_no_tool_opens_or_closes_a_turn(spelt: str) -> None:
    tokenizer = tokenizer_with(habits.TOOLS)
    renderer = Renderer(tokenizer, Prompts(**ROOM))

    def example(text: str) -> Example:
        call = {"type": "function", "function": {"name": "f", "arguments": {"a": text}}}
        tool = {"type": "function", "function": {"name": "f", "description": text, "parameters": {text: {"type": "string"}}}}
        since = (Turn("assistant", "", tool_calls=(call,)), Turn("tool", text, name="f"))
        return Example("k", "q", "r", since=since, tools=(tool,))

    found, honest = renderer.prompt(example(spelt)).ids, renderer.prompt(example("x")).ids
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        id = tokenizer.convert_tokens_to_ids(token)
        assert found.count(id) == honest.count(id)


# --- BOS


@pytest.mark.parametrize("format", ["chat", "alpaca", "alpaca_es"])
def test_bos_is_the_tokenizers_habit_and_stands_once(format: Any) -> None:
    tokenizer = with_bos(tokenizer_with(habits.CHATML))
    for template in (habits.CHATML, "{{ bos_token }}" + habits.CHATML):
        tokenizer.chat_template = template
        renderer, counts = Renderer(tokenizer, Prompts(format=format)), Counts()
        ((prompt, _),) = instruction_pairs([QUESTION], renderer, counts)
        assert prompt[0] == tokenizer.bos_token_id
        assert prompt.count(tokenizer.bos_token_id) == 1
        assert counts.begins_with == "<s>"


def test_bos_is_not_written_where_the_tokenizer_does_not() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    renderer = Renderer(tokenizer, Prompts())
    ids = renderer.prompt(QUESTION).ids
    assert ids == theirs(tokenizer, messages_of(QUESTION), True)
    assert renderer.begins_with == "<|im_start|>"
    assert Renderer(tokenizer, Prompts(format="alpaca")).begins_with == ""


def test_pretraining_text_begins_as_the_tokenizer_begins_it() -> None:
    tokenizer = with_bos(chat_tokenizer())
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    words = tokenizer.encode("peat and oak", add_special_tokens=False)
    pairs = list(text_pairs(["peat and oak", "peat and oak"], tokenizer, 10_000))
    assert pairs == [([bos], [*words, eos, bos, *words, eos])]
    small = list(text_pairs(["peat and oak"] * 9, tokenizer, 8))
    assert all(prompt == [bos] and len(response) <= 7 for prompt, response in small)
    assert [id for _, response in small for id in response if id not in (bos, eos)] == words * 9


# --- what leaves the house


FORMS = [
    (habits.CHATML, {}),
    (habits.CHATML, {"system": "It's \"so\",\n\\ brief."}),
    (habits.CHATML + "\n", {"generation_prompt": "<|im_start|>A\n", "answers": "row"}),
    (" \n" + habits.CHATML, {"system": "S."}),
    ("  {% set x = 1 %}\n" + habits.CHATML, {"system": "S."}),
    (habits.NO_SYSTEM, {"system": "S.", "system_turn": "user"}),
    (habits.CHATML, {"thinking": "strip"}),
    (habits.OPENS_THOUGHT, {"thinking": "keep"}),
    (habits.OPENS_THOUGHT, {"generation_prompt": HEADER}),
    (habits.DATED, {"date": "2026-11-28"}),
    (WHICH, {"variables": {"enable": True}, "answers": "row"}),
    (None, {"format": "alpaca"}),
    (habits.CHATML, {"format": "alpaca"}),
    (habits.CHATML, {"format": "alpaca_es"}),
]  # fmt: skip
ASKS = [
    Example("k", "Say peat.", "Peat."),
    Example("k", "Say peat {instruction}.", "Peat.", context="Peat smokes {context}."),
    Example("k", "Again.", "Oak.", history=(Turn("user", "Say oak."), Turn("assistant", "<think>x</think>\n\nOak."))),
    Example("k", "Again.", "Oak.", history=(Turn("system", "Be brief."), Turn("user", "Say oak."), Turn("assistant", "Oak."))),
]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(("template", "prompts"), FORMS)
def test_the_exported_template_writes_what_was_trained(
    clock: Any, template: str | None, prompts: dict[str, Any], bos: bool
) -> None:
    tokenizer = with_bos(tokenizer_with(template)) if bos else tokenizer_with(template)
    settings_ = Prompts(**prompts, **ROOM)
    renderer = Renderer(tokenizer, settings_)
    wanted = [renderer.prompt(example).ids for example in ASKS]
    tokenizer.chat_template = exported_template(tokenizer, settings_)
    for example, ids in zip(ASKS, wanted, strict=True):
        messages: list[dict[str, str]] = messages_of(example)
        if settings_.format == "chat" and example.context:
            messages[-1]["content"] = f"{example.context}\n\n{example.instruction}"
        elif example.context:
            messages[-1]["context"] = example.context
        assert theirs(tokenizer, messages, True) == ids


def test_a_model_without_a_template_leaves_with_one() -> None:
    tokenizer = gpt2_tokenizer()
    prompts = Prompts(format="alpaca")
    row = Renderer(tokenizer, prompts).row(QUESTION)
    tokenizer.chat_template = exported_template(tokenizer, prompts)
    messages = messages_of(QUESTION)
    assert theirs(tokenizer, messages, True) == row.prompt
    assert theirs(tokenizer, [*messages, {"role": "assistant", "content": "2"}], False) == [*row.prompt, *row.response]


# --- other people's templates and models


def trl_templates() -> list[Path]:
    from importlib.util import find_spec

    spec = find_spec("trl")
    return sorted(Path(spec.origin).parent.glob("chat_templates/*.jinja")) if spec and spec.origin else []


def resolving(tokenizer: Any, example: Example) -> Iterator[dict[str, Any]]:
    """Settings under which the template's habits let the row be trained."""
    for more in ({}, {"answers": "template"}, {"answers": "row"}, {"thinking": "keep"}, {"thinking": "keep", "answers": "row"}):
        prompts = {"date": "2026-11-28", **more, **ROOM}
        if not template_problems(tokenizer, Prompts(**prompts), [example]):
            yield prompts


@pytest.mark.parametrize("path", trl_templates() or [pytest.param(None, marks=pytest.mark.skip("TRL is not installed"))])
def test_templates_that_trl_ships(path: Path) -> None:
    """Each is either refused in words for text alone, or some setting trains it; where nothing is set, the law holds."""
    source = path.read_text(encoding="utf-8")
    tokens = sorted(
        set(
            re.findall(
                r"<[|｜][^<>\s'\"]{1,40}[|｜]>|</?(?:start_of_turn|end_of_turn|think|tool_call)>|<[|]?[a-z]+[|]?>", source
            )
        )
    )
    tokenizer = tokenizer_with(source, added=tuple(tokens))
    tokenizer.bos_token = "<|endoftext|>"
    for example in (QUESTION, THOUGHT, LATER):
        found = list(resolving(tokenizer, example))
        if not found:
            (problem,) = template_problems(tokenizer, Prompts(date="2026-11-28"), [example])
            assert "leaves out the user's text" in problem or "refuses a conversation" in problem
            continue
        for prompts in found:
            renderer = Renderer(tokenizer, Prompts(**prompts))
            try:
                row = renderer.row(example)
            except LeftOut:  # an answer without reasoning, where the prompt opens it
                assert prompts["thinking"] == "keep"
                continue
            assert row.response[-1] == renderer.end_of_turn_id
            if not {"answers", "thinking"} & prompts.keys():
                day = {"date_string": "28 Nov 2026"} if "strftime_now" in source else {}
                assert obeys(tokenizer, example, row, renderer.end_of_turn_id, **day)


@pytest.fixture(scope="module")
def real() -> Path:
    folder = os.environ.get("POTSTILL_REAL_MODELS")
    if not folder:
        pytest.skip("POTSTILL_REAL_MODELS names no folder of real models")
    missing = [name for name in ("gemma3", "smollm2") if not (Path(folder) / name).is_dir()]
    if missing:
        pytest.skip(f"{folder} lacks {', '.join(missing)}")
    return Path(folder)


@pytest.mark.real
def test_gemma_reads_its_bos_and_smollm_its_own_only_once(real: Path) -> None:
    from potstill.edges.models import load_tokenizer

    gemma, smollm = (load_tokenizer(f"path:{real / name}") for name in ("gemma3", "smollm2"))
    ids = Renderer(gemma, Prompts(format="alpaca_es")).prompt(QUESTION).ids
    assert ids[:1] == [gemma.bos_token_id]
    assert ids.count(gemma.bos_token_id) == 1
    assert gemma("a\n\nb").input_ids == [gemma.bos_token_id, *encode(gemma, "a\n\nb")]
    renderer = Renderer(smollm, Prompts())
    assert renderer.prompt(QUESTION).ids == theirs(smollm, messages_of(QUESTION), True)
    assert renderer.begins_with == smollm.bos_token == "<|im_start|>"


@pytest.mark.real
def test_gemma_without_bos_would_be_another_model(real: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from potstill.edges.models import load_tokenizer

    tokenizer = load_tokenizer(f"path:{real / 'gemma3'}")
    model = AutoModelForCausalLM.from_pretrained(real / "gemma3", dtype=torch.float32).eval()
    answer = "Lima es la capital del Perú, situada en la costa central del país, a orillas del océano Pacífico."
    row = Renderer(tokenizer, Prompts(format="alpaca_es")).row(Example("k", "¿Qué es Lima?", answer))

    def nats(prompt: list[int]) -> float:
        ids_BT = torch.tensor([[*prompt, *row.response]])
        labels_BT = torch.tensor([[-100] * len(prompt) + row.response])
        with torch.inference_mode():
            return float(model(input_ids=ids_BT, labels=labels_BT).loss)

    assert nats(row.prompt) < 0.8 * nats(row.prompt[1:])


ASKED_OTHERWISE = {
    "by another name": "{% set f = strftime_now %}{{ f('%d %b %Y') }}",
    "in brackets": "{{ (strftime_now)('%d %b %Y') }}",
    "by name of the argument": "{{ strftime_now(format='%d %b %Y') }}",
    "put together": "{{ strftime_now('%d ' ~ '%b' ~ ' %Y') }}",
    "from a variable": "{% set f = '%d %b %Y' %}{{ strftime_now(f) }}",
}


@pytest.mark.parametrize("ask", ASKED_OTHERWISE.values(), ids=ASKED_OTHERWISE)
def test_no_clock_is_asked_however_a_template_asks(ask: str) -> None:
    from potstill.data.templates import dated

    tokenizer = copy.deepcopy(chat_tokenizer())
    tokenizer.chat_template = ask + tokenizer.chat_template
    text = Renderer(tokenizer, Prompts(date="2020-01-02")).text(Example("k", "x", "y"), "")
    assert text.startswith("02 Jan 2020<|im_start|>")
    with pytest.raises(UserError, match=r"set prompts\.date"):
        Renderer(tokenizer, Prompts())
    assert "2020" not in dated(tokenizer.chat_template, None)
    tokenizer.chat_template = exported_template(tokenizer, Prompts(date="2020-01-02"))
    elsewhere = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    assert elsewhere == text, "what another program writes, whatever its clock says"


def test_a_token_that_the_template_only_names_is_no_turn_token() -> None:
    from habits import CHATML, tokenizer_with

    default = "<|im_start|>system\nAnswer each question with a single label out of these: <joy> or <anger>.<|im_end|>\n"
    tokenizer = tokenizer_with("{{ '" + default.replace("\n", "\\n") + "' }}" + CHATML, special=("<joy>", "<anger>"))
    joy = tokenizer.convert_tokens_to_ids("<joy>")
    renderer = Renderer(tokenizer, Prompts())
    assert renderer.response("<joy>") == [joy, renderer.end_of_turn_id]
    assert decode(tokenizer, [joy, renderer.end_of_turn_id], renderer.stop_ids) == "<joy>"


def test_a_directive_that_nobody_knows_is_refused_and_not_written() -> None:
    """Python's own strftime leaves it to the C library what `%q` is."""
    asks = "{{ strftime_now('%d %q') }}" + habits.CHATML
    with pytest.raises(UserError, match=r"cannot write the date as %d %q"):
        Renderer(tokenizer_with(asks), Prompts(date="2026-11-28"))
    known = tokenizer_with("{{ strftime_now('%%d %-d %l%P %R') }}" + habits.CHATML)
    assert Renderer(known, Prompts(date="2026-11-08")).text(QUESTION, "").startswith("%d 8 12am 00:00<|im_start|>")


@pytest.mark.parametrize("words", ["Label with <joy> or <anger>.", "Answer <joy> or <anger>", "<joy>"])
def test_label_tokens_just_before_the_first_header_are_no_turn_tokens(words: str) -> None:
    default = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + words + "<|im_end|>\n' }}{% endif %}"
    tokenizer = tokenizer_with(default + habits.CHATML, added=("<joy>", "<anger>"))
    assert tokenizer.convert_ids_to_tokens(sorted(turn_tokens(tokenizer))) == ["<|im_start|>", "<|im_end|>"]
    renderer = Renderer(tokenizer, Prompts())
    joy = tokenizer.convert_tokens_to_ids("<joy>")
    assert renderer.response("<joy>") == [joy, renderer.end_of_turn_id]
    assert decode(tokenizer, [joy, renderer.end_of_turn_id], renderer.stop_ids) == "<joy>"


def test_headers_of_one_turn_each_are_turn_tokens() -> None:
    header = "{{ {'system': '[SYS]', 'user': '[ASK]', 'assistant': '[SAY]'}[m['role']] + m['content'] + eos_token }}"
    names = ("[SYS]", "[ASK]", "[SAY]")
    tokenizer = tokenizer_with("{% for m in messages %}" + header + "{% endfor %}", added=names)
    assert turn_tokens(tokenizer) == {*tokenizer.convert_tokens_to_ids(names), tokenizer.eos_token_id}


DEFAULT = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}"


@pytest.mark.parametrize("before", ["", DEFAULT])
def test_a_last_turn_without_an_end_is_taught_the_end_of_history(before: str) -> None:
    tokenizer = tokenizer_with(before + habits.OPEN_LAST)
    tokenizer.eos_token = "<|endoftext|>"
    renderer = Renderer(tokenizer, Prompts())
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (renderer.end_of_turn_id, renderer.stop_ids) == (end, [end, tokenizer.eos_token_id])
    for example in (QUESTION, replace(LATER, history=(Turn("user", "Hi"), Turn("assistant", "Hello")))):
        row = renderer.row(example)
        later = [*messages_of(example), {"role": "assistant", "content": "2"}, {"role": "user", "content": "And 3?"}]
        ours = [*row.prompt, *row.response]
        assert ours == theirs(tokenizer, later, False)[: len(ours)], "the answer ends as it will in history"
    assert end_of_turn(tokenizer) == end


@pytest.mark.parametrize("before", ["", DEFAULT])
def test_the_next_turns_header_is_no_end(before: str) -> None:
    tokenizer = tokenizer_with(before + habits.NO_ENDS)
    tokenizer.eos_token = "<|endoftext|>"
    assert Renderer(tokenizer, Prompts()).stop_ids == [tokenizer.eos_token_id]
    assert end_of_turn(tokenizer) is None


ASKS_IS = Turn("assistant", "a", tool_calls=({"function": {"name": "is", "arguments": {"x": 1}}},))
LAST = "{% set m = messages[-1] %}" + habits.TURN + habits.ASKED


@pytest.mark.parametrize(
    ("template", "prompts", "example", "words"),
    [
        (habits.NO_SYSTEM, {"system": "user"}, QUESTION, r"leaves out or changes the system text.*system_turn"),
        (LAST, {}, Example("k", "2+2?", "4", history=(Turn("user", "2"), Turn("assistant", "2"))), r"role 'user' says.*\"2\""),
        (LAST, {}, Example("k", "Hi user", "4", history=(Turn("assistant", "user"),)), r"role 'assistant' says.*\"user\""),
        (habits.CHATML, {}, replace(QUESTION, tools=({"type": "function", "function": {"name": "user"}},)), r"tools.*\"user\""),
        (habits.CHATML, {}, Example("k", "Say is 1.", "1", history=(Turn("user", "q"), ASKS_IS)), r"tool_calls.*\"is\""),
    ],
)  # fmt: skip
def test_words_that_stand_elsewhere_hide_no_turn(template: str, prompts: dict[str, Any], example: Example, words: str) -> None:
    tokenizer = tokenizer_with(template)
    (problem,) = template_problems(tokenizer, Prompts(**prompts), [example])
    assert re.search(words, problem)
    with pytest.raises(UserError, match=words):
        Renderer(tokenizer, Prompts(**prompts)).prompt(example)


def test_a_system_text_goes_before_the_first_question_and_not_into_a_greeting() -> None:
    tokenizer = tokenizer_with(habits.NO_SYSTEM)
    prompts = Prompts(system="S.", system_turn="user")
    example = Example("k", "What?", "2", history=(Turn("assistant", "Hello."),))
    asked = Renderer(tokenizer, prompts).text(example, "")
    assert asked == "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nS.\n\nWhat?<|im_end|>\n" + HEADER
    tokenizer.chat_template = exported_template(tokenizer, prompts)
    assert tokenizer.apply_chat_template(messages_of(example), tokenize=False, add_generation_prompt=True) == asked


PEAT: dict[str, Any] = {"type": "function", "function": {"name": "peat", "arguments": {"of": "oak"}}}
THOUGHT_AND_CALLED = Example(
    "k",
    "Again.",
    "Oak.",
    history=(
        Turn("user", "Say oak."),
        Turn("assistant", "<think>hm</think>\n\nI ask.", tool_calls=(PEAT,)),
        Turn("tool", "smoke"),
        Turn("assistant", "", reasoning="so", tool_calls=(PEAT,)),
        Turn("tool", "fire"),
        Turn("assistant", "Oak.", reasoning="done"),
    ),
)


def test_an_export_strips_the_reasoning_of_turns_that_call_tools() -> None:
    tokenizer, prompts = tokenizer_with(habits.TOOLS), Prompts(thinking="strip", **ROOM)
    asked = Renderer(tokenizer, prompts).text(THOUGHT_AND_CALLED, "")
    assert "<think>" not in asked
    assert asked.count("<tool_call>") == 2
    tokenizer.chat_template = exported_template(tokenizer, prompts)
    messages: list[dict[str, Any]] = messages_of(THOUGHT_AND_CALLED)
    for message, turn in zip(messages, THOUGHT_AND_CALLED.history, strict=False):
        message.update({"tool_calls": list(turn.tool_calls)} if turn.tool_calls else {})
        message.update({"reasoning_content": turn.reasoning} if turn.reasoning else {})
    messages[3]["content"] = None
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == asked


@pytest.mark.parametrize("end", ["", "\n", "\n  "])
@pytest.mark.parametrize("begin", ["", " \n", "  {% set x = 1 %}\n", "{# note #}\n"])
def test_an_export_keeps_the_template_of_tools(begin: str, end: str) -> None:
    tokenizer, prompts = tokenizer_with(None), Prompts(system="S.", date="2026-11-28", **ROOM)
    tokenizer.chat_template = {"default": begin + habits.DATED + end, "tool_use": begin + habits.TOOLS + end}
    tools = ({"type": "function", "function": {"name": "peat"}},)
    renderer = Renderer(tokenizer, prompts)
    wanted = [renderer.text(example, "") for example in (QUESTION, replace(QUESTION, tools=tools))]
    tokenizer.chat_template = exported_template(tokenizer, prompts)
    written = [
        tokenizer.apply_chat_template(messages_of(QUESTION), tools=offered, tokenize=False, add_generation_prompt=True)
        for offered in (None, list(tools))
    ]
    assert written == wanted
    assert "28 Nov 2026" in wanted[0]
    assert '"peat"' in wanted[1]


TEXT_END = (
    "{% for m in messages %}{{ '### ' + m.role + '\n' + m.content + '\n### end\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)


def test_an_end_that_is_text_is_never_replaced_in_silence() -> None:
    tokenizer, example = tokenizer_with(TEXT_END), Example("a", "q", "a")
    with pytest.raises(UserError, match=r'ends an answer with text \("\\n### end\\n"\) and not with a token') as refused:
        Renderer(tokenizer, Prompts())
    assert 'prompts.answers = "template"' in str(refused.value)
    learned = {}
    for answers in ("row", "template"):
        renderer = Renderer(tokenizer, Prompts(answers=answers))
        learned[answers] = tokenizer.decode(renderer.row(example).response)
        assert renderer.scored(example).references == ("a",)
        assert renderer.said("a\n### end\n### user\nand so on") == "a"
    assert learned == {"row": f"a{tokenizer.eos_token}", "template": f"a\n### end\n{tokenizer.eos_token}"}


def test_white_space_after_an_answer_is_no_end() -> None:
    template = TEXT_END.replace("\n### end", "")
    row = Renderer(tokenizer_with(template), Prompts()).row(Example("a", "q", "a"))
    assert row.response[-1] == tokenizer_with(template).eos_token_id
