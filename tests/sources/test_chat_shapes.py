"""Chats as OpenAI and ShareGPT write them, pairs under other names, and what is said of rows of no known shape."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from potstill.core.errors import UserError
from potstill.core.types import Example, Turn
from potstill.sources.jsonl import Jsonl

WriteRows = Callable[..., str]
MIXED = "'role' and 'content' are mixed with 'from' and 'value'; write a row's messages in one shape"


def said(*pairs: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in pairs], **more}


@pytest.fixture
def read_one(write_rows: WriteRows) -> Callable[..., Example]:
    def read(row: dict[str, Any], **fields: Any) -> Example:
        (example,) = Jsonl(path=write_rows([row]), **fields).rows()
        return example

    return read


@pytest.fixture
def complaint(write_rows: WriteRows) -> Callable[..., str]:
    def told(row: dict[str, Any], **fields: Any) -> str:
        path = write_rows([row])
        with pytest.raises(UserError) as caught:
            list(Jsonl(path=path, **fields).rows())
        return str(caught.value).removeprefix(f"{path}:1: ")

    return told


def test_both_shapes_of_a_chat_are_one_example(read_one: Callable[..., Example]) -> None:
    turns = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello"), ("human", "2 + 2?"), ("gpt", "4")]
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    plain = {"conversations": [{"role": roles[speaker], "content": value} for speaker, value in turns]}
    parts = {
        "conversations": [
            {"role": roles[speaker], "content": [{"type": "text", "text": value, "image_url": None}]}
            for speaker, value in turns
        ]
    }
    as_json = {"conversations": json.dumps(said(*turns)["conversations"])}
    expected = read_one(plain, messages="conversations")
    assert (expected.instruction, expected.response) == ("2 + 2?", "4")
    for row in (said(*turns), parts, as_json):
        assert read_one(row, messages="conversations") == expected


def test_sharegpt_tools_by_call_or_in_words(read_one: Callable[..., Example]) -> None:
    call = {"name": "weather", "arguments": {"city": "Lima"}}
    row = said(("human", "Weather?"), ("function_call", json.dumps(call)), ("observation", "20"), ("gpt", "20 °C"))
    made = {"type": "function", "function": call}
    assert read_one(row, messages="conversations").since == (Turn("assistant", "", tool_calls=(made,)), Turn("tool", "20"))
    row = said(("human", "Weather?"), ("gpt", "<tool_call>"), ("tool", "20"), ("gpt", "20 °C"))
    assert read_one(row, messages="conversations").since == (Turn("assistant", "<tool_call>"), Turn("tool", "20"))


def test_sharegpt_weights_and_parts_of_texts(read_one: Callable[..., Example]) -> None:
    row = said(("human", "Hi"), ("gpt", "Hello"))
    row["conversations"][1]["weight"] = 0
    assert read_one(row, messages="conversations").weight == 0
    two = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {"m": [{"role": "user", "content": two}, {"role": "assistant", "content": "x"}]}
    assert read_one(row, messages="m").instruction == "a\nb"


def test_ignored_keys_tell_no_shape(read_one: Callable[..., Example]) -> None:
    row = said(("human", "Hi"), ("gpt", "Hello"))
    for message in row["conversations"]:
        message["role"] = "speaker"
    assert read_one(row, messages="conversations", ignored=["role"]).response == "Hello"
    row = {"m": [{"role": "user", "content": "Hi", "from": "Ann"}, {"role": "assistant", "content": "Hello", "from": "Bob"}]}
    assert read_one(row, messages="m", ignored=["from"]).response == "Hello"


def user(**message: Any) -> list[dict[str, Any]]:
    return [message, {"role": "assistant", "content": "x"}]


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (user(**{"from": "human", "value": "x"}), f"m[1]: {MIXED}"),
        (user(role="user", value="x"), f"m[0]: {MIXED}"),
        (
            [{"from": "human", "value": "x"}, {"from": "bing", "value": "y"}],
            "m[1] is from 'bing'; speakers are system, human, user, gpt, chatgpt, assistant, function_call, tool, observation",
        ),
        ([{"from": "human"}], "m[0]: no column 'value' (columns: from)"),
        (
            [{"from": "gpt", "value": "x"}],
            "m[0] is of role 'assistant', not 'user'; user and assistant take turns after an optional system",
        ),
        (
            [{"from": "human", "value": "x"}, {"from": "function_call", "value": "weather()"}],
            "m[1] is from 'function_call', and its value is not JSON; write name and arguments",
        ),
        (
            user(role="user", content=[{"type": "image_url", "image_url": {"url": "x"}}]),
            "m[0]: content[0] is of type 'image_url'; only parts of type 'text' are read",
        ),
        (
            user(role="user", content=[{"type": "text", "text": "a", "cache": 1}]),
            "m[0]: content[0] has a key 'cache' that is not read; take it out, or set data.ignored = [\"cache\"]",
        ),
        (user(role="user", content=["a"]), "m[0]: content[0] must be an object with type and text"),
        (user(role="user"), "m[0]: no column 'content' (columns: role)"),
        ("[1", "column 'm' must hold a list of messages with role and content, or that list as JSON"),
    ],
)
def test_a_mix_or_an_unknown_speaker_is_named(messages: Any, told: str, complaint: Callable[..., str]) -> None:
    assert complaint({"m": messages}, messages="m") == told


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": CHAT}, "no column 'instruction' (columns: messages); set data.messages = \"messages\""),
        (
            {"id": 1, "dialog": json.dumps(CHAT)},
            "no column 'instruction' (columns: id, dialog); set data.messages = \"dialog\"",
        ),
        (said(("human", "Hi")), "no column 'instruction' (columns: conversations); set data.messages = \"conversations\""),
        (
            {"instruction": "a", "input": "b", "output": "c"},
            "no column 'response' (columns: instruction, input, output); "
            'set data.response = "output" and data.context = "input"',
        ),
        (
            {"Question": "a", "Answer": "b"},
            "no column 'instruction' (columns: Question, Answer); "
            'set data.instruction = "Question" and data.response = "Answer"',
        ),
        (
            {"input": "a", "output": "b"},
            'no column \'instruction\' (columns: input, output); set data.instruction = "input" and data.response = "output"',
        ),
        (
            {"question": "a", "answers": {"text": ["b"]}},
            "no column 'instruction' (columns: question, answers); say by data.instruction which of them it is",
        ),
        ({"messages": []}, "no column 'instruction' (columns: messages); say by data.instruction which of them it is"),
    ],
)
def test_rows_of_a_known_shape_name_the_fields_to_set(row: dict[str, Any], told: str, complaint: Callable[..., str]) -> None:
    assert complaint(row) == told


def test_what_the_complaint_says_reads_the_row(read_one: Callable[..., Example]) -> None:
    assert read_one({"messages": CHAT}, messages="messages").response == "Hello"
    row = {"instruction": "a", "input": "b", "output": "c"}
    example = read_one(row, response="output", context="input")
    assert (example.instruction, example.context, example.response) == ("a", "b", "c")


def test_another_column_of_chats_is_named(complaint: Callable[..., str]) -> None:
    told = "no column 'messages' (columns: conversations); set data.messages = \"conversations\""
    assert complaint(said(("human", "Hi")), messages="messages") == told


def test_names_of_many_long_columns_are_shortened(complaint: Callable[..., str]) -> None:
    row = {"x" * 50 + str(number): "a" for number in range(30)}
    told = "no column 'instruction' (columns: " + ", ".join(["x" * 40 + "…"] * 20) + " and 10 more)"
    assert complaint(row) == told + "; say by data.instruction which of them it is"


@pytest.mark.parametrize("content", ['[\n  {"instruction": "a"}\n]', '[{"instruction": "a"}]'])
def test_a_json_list_is_no_file_of_lines(content: str, tmp_path: Any) -> None:
    file = tmp_path / "rows.json"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        list(Jsonl(path=str(file)).rows())
    told = f"{file}: is one JSON list, not one JSON object per line; write `jq -c '.[]' {file} > rows.jsonl`"
    assert str(caught.value) == told


@pytest.mark.parametrize("name", ["rows.csv", "rows.TSV", "rows.csv.gz"])
def test_a_table_is_no_file_of_lines(name: str, tmp_path: Any) -> None:
    file = tmp_path / name
    file.write_text("instruction,response\na,b\n")
    with pytest.raises(UserError) as caught:
        list(Jsonl(path=str(file)).rows())
    assert str(caught.value) == f'{file}: is no JSON, and named like a table; set data.kind = "csv"'
