"""The general reader of JSON lines: columns, chats, and the exact words of every complaint."""

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from counting import left_out

from potstill.core.errors import UserError
from potstill.core.types import Turn
from potstill.sources.jsonl import Jsonl

WriteRows = Callable[..., str]
PAIR = {"instruction": "2 + 2?", "response": "4"}


def complaint(**fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        list(Jsonl(**fields).rows())
    return str(caught.value)


def test_a_column_may_weight_the_rows(write_rows: WriteRows) -> None:
    path = write_rows([PAIR | {"w": 2}, PAIR | {"w": 0.5}, PAIR | {"w": 0}])
    assert [row.weight for row in Jsonl(path=path, weight="w").rows()] == [2.0, 0.5, 0.0]
    assert {row.weight for row in Jsonl(path=path).rows()} == {1.0}


@pytest.mark.parametrize("value", [-1, "2", True, None, float("inf")])
def test_a_weight_is_a_number_of_0_or_more(value: Any, write_rows: WriteRows) -> None:
    told = complaint(path=write_rows([PAIR | {"w": value}]), weight="w")
    assert told.endswith("column 'w' weights the rows and must hold a number of 0 or more")


def test_columns_are_named_by_fields(write_rows: WriteRows) -> None:
    row = {"q": "¿Qué?", "a": "Eso.", "c": "texto", "all": ["Eso.", "Esto.", ""], "n": 7, "g": "corta", "l": "es"}
    source = Jsonl(
        path=write_rows([row, {**row, "l": None, "c": None}]),
        instruction="q",
        response="a",
        context="c",
        references="all",
        key="n",
        tag="g",
        language_column="l",
    )
    first, second = source.rows()
    assert (first.instruction, first.response, first.context) == ("¿Qué?", "Eso.", "texto")
    assert (first.references, first.key, first.tag, first.language) == (("Eso.", "Esto."), "7", "corta", "es")
    assert (second.context, second.language) == ("", "")


def test_the_response_leads_the_references(write_rows: WriteRows) -> None:
    path = write_rows([{**PAIR, "all": ["four", "4"]}, {**PAIR, "all": None}])
    assert [row.references for row in Jsonl(path=path, references="all").rows()] == [("4", "four"), ("4",)]


def test_equal_questions_share_a_key_and_others_do_not(write_rows: WriteRows) -> None:
    asked = [("2 + 2?", "", "4"), ("2 + 2?", "", "four"), ("2 + 2", "?", "4"), ("2 + 2", "", "4"), ("", "2 + 2?", "4")]
    rows = [{"instruction": question, "context": context, "response": answer} for question, context, answer in asked]
    first, second, *others = Jsonl(path=write_rows([*rows[:4], {**PAIR, "context": "2 + 2?"}]), context="context").rows()
    assert first.key == second.key
    assert others[1].key == first.key  # final punctuation does not part questions
    assert len({row.key for row in (first, *others)}) == 3


def test_chats_that_open_otherwise_have_other_keys(write_rows: WriteRows) -> None:
    def chat(first: str, answer: str) -> dict[str, Any]:
        said = [("user", first), ("assistant", "Yes"), ("user", "2 + 2?"), ("assistant", answer)]
        return {"messages": [{"role": role, "content": content} for role, content in said]}

    path = write_rows([chat("Hi", "4"), chat("Hi", "four"), chat("Hello", "4")])
    first, second, third = Jsonl(path=path, messages="messages").rows()
    assert first.key == second.key != third.key


def test_a_chat_becomes_history_instruction_and_response(write_rows: WriteRows) -> None:
    chat = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "2 + 2?"), ("assistant", "4")]
    messages = [{"role": role, "content": content} for role, content in chat]
    (example,) = Jsonl(path=write_rows([{"messages": messages}]), messages="messages").rows()
    assert (example.instruction, example.response) == ("2 + 2?", "4")
    assert example.history == (Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Hello"))


TURNS = "user and assistant take turns after an optional system"


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ("uu", f"m[1] is of role 'user', not 'assistant'; {TURNS}"),
        ("au", f"m[0] is of role 'assistant', not 'user'; {TURNS}"),
        ("uasua", f"m[2] is of role 'system', not 'user'; {TURNS}"),
        ("ssua", f"m[1] is of role 'system', not 'user'; {TURNS}"),
        ("uau", "column 'm' must end with a question of the user and an answer of the assistant"),
        ("s", "column 'm' must end with a question of the user and an answer of the assistant"),
        ("", "column 'm' must end with a question of the user and an answer of the assistant"),
    ],
)
def test_roles_out_of_order(roles: str, message: str, write_rows: WriteRows) -> None:
    names = {"u": "user", "a": "assistant", "s": "system"}
    path = write_rows([{"m": [{"role": names[role], "content": "x"} for role in roles]}])
    assert complaint(path=path, messages="m") == f"{path}:1: {message}"


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ("hi", "column 'm' must hold a list of messages with role and content, or that list as JSON"),
        (["hi"], "m[0] must be an object with role and content"),
        ([{"who": "human", "says": "hi"}], "m[0]: no column 'role' (columns: who, says)"),
        ([{"role": "user", "content": [1]}], "m[0]: content[0] must be an object with type and text"),
    ],
)
def test_chats_of_another_shape(chat: Any, message: str, write_rows: WriteRows) -> None:
    path = write_rows([{"m": chat}])
    assert complaint(path=path, messages="m") == f"{path}:1: {message}"


def test_rows_without_answer_are_skipped_and_counted(write_rows: WriteRows) -> None:
    rows = [PAIR, {**PAIR, "response": " \n"}, {**PAIR, "response": None}, {**PAIR, "instruction": ""}]
    source = Jsonl(path=write_rows(rows))
    assert len(list(source.rows())) == 1
    assert left_out(source) == {"empty response": 2, "empty instruction": 1}


def test_rows_without_answer_can_be_refused(write_rows: WriteRows) -> None:
    path = write_rows([PAIR, {**PAIR, "response": ""}])
    assert complaint(path=path, on_empty="refuse") == f'{path}:2: empty response; fill it in, or set on_empty = "skip"'


def test_byte_order_mark_blank_lines_and_missing_last_newline_are_tolerated(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\r\n" + json.dumps(PAIR).encode())
    assert len(list(Jsonl(path=str(file)).rows())) == 2


def test_the_home_directory_and_the_current_one(write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows([PAIR])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(list(Jsonl(path="~/rows.jsonl").rows())) == 1
    monkeypatch.chdir(tmp_path)
    assert len(list(Jsonl(path="rows.jsonl").rows())) == 1


def test_no_such_file(write_rows: WriteRows, tmp_path: Path) -> None:
    write_rows([PAIR], "rows.jsonl")
    near, far, lost = tmp_path / "row.csv", tmp_path / "dolly.jsonl", tmp_path / "no" / "rows.jsonl"
    assert complaint(path=str(near)) == f"{near}: no such file in {tmp_path}; did you mean '{tmp_path / 'rows.jsonl'}'?"
    assert complaint(path=str(far)) == f"{far}: no such file in {tmp_path}; check data.path"
    assert complaint(path=str(lost)) == f"{lost}: no such folder as {tmp_path / 'no'}; check data.path"
    with pytest.raises(UserError, match="no such file"):
        Jsonl(path=str(near)).content_hash()


def test_a_folder(tmp_path: Path) -> None:
    assert complaint(path=str(tmp_path)) == f"{tmp_path}: is a folder; name one file"


def test_no_permission(write_rows: WriteRows) -> None:
    path = write_rows([PAIR])
    os.chmod(path, 0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert complaint(path=path) == f"{path}: no permission to read it; try `chmod u+r {path}`"


def test_a_file_taken_for_a_folder(write_rows: WriteRows) -> None:
    path = write_rows([PAIR]) + "/rows.jsonl"
    assert complaint(path=path) == f"{path}: cannot be opened (Not a directory); check data.path"


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"\xef\xbb\xbf"])
def test_no_rows(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    assert complaint(path=str(file)) == f"{file}: has no rows; write one JSON object per line"


ONE_PER_LINE = "write one JSON object per line"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"instruction": "Qu\xe9", "response": "x"}', "not UTF-8 (byte 0xe9 in column 20); save the file as UTF-8"),
        (b'{"instruction": "a"', f"not valid JSON (Expecting ',' delimiter in column 20); {ONE_PER_LINE}"),
        (b"[", f"not valid JSON (Expecting value in column 2); {ONE_PER_LINE}"),
        (b"[" * 100_000, f"not valid JSON (nested too deeply); {ONE_PER_LINE}"),
        (b'["a", "b"]', f"a list, not an object; {ONE_PER_LINE}"),
        (b"3", f"a number, not an object; {ONE_PER_LINE}"),
        (b"null", f"null, not an object; {ONE_PER_LINE}"),
        (b'{"response": "x"}', "no column 'instruction' (columns: response); say by data.instruction which of them it is"),
        (
            b'{"instrution": "a", "response": "x"}',
            "no column 'instruction'; did you mean 'instrution'? (columns: instrution, response)",
        ),
        (b"{}", "no column 'instruction' (it has no columns)"),
        (b'{"instruction": "a", "response": 4}', "column 'response' holds a number, not text"),
        (b'{"instruction": {"a": 1}, "response": ""}', "column 'instruction' holds an object, not text"),
        (b'{"instruction": true, "response": ""}', "column 'instruction' holds a truth value, not text"),
        (
            b'{"instruction": "\\ud83d", "response": ""}',
            "column 'instruction' holds '\\ud83d', half of a surrogate pair; write the whole character",
        ),
    ],
)
def test_a_broken_line_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps(PAIR).encode() + b"\n" + line + b"\n")
    assert complaint(path=str(file)) == f"{file}:2: {message}"


@pytest.mark.parametrize(
    ("fields", "row", "message"),
    [
        ({"context": "passage"}, {}, "no column 'passage' (columns: instruction, response)"),
        ({"references": "all"}, {"all": "x"}, 'column \'all\' holds text, not a list of texts; write it as ["one", "two"]'),
        ({"references": "all"}, {"all": ["x", 3]}, "column 'all', item 2 holds a number, not text"),
        ({"key": "id"}, {"id": 1.5}, "column 'id' splits the rows and must hold text or a whole number"),
        ({"key": "id"}, {"id": None}, "column 'id' splits the rows and must hold text or a whole number"),
    ],
)
def test_a_wrong_optional_column_is_named(
    fields: dict[str, str], row: dict[str, Any], message: str, write_rows: WriteRows
) -> None:
    path = write_rows([{**PAIR, **row}])
    assert complaint(path=path, **fields) == f"{path}:1: {message}"


def test_memory_does_not_grow_with_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with file.open("w") as out:
        out.writelines(f'{{"instruction": "{number}", "response": "{"x" * 200}"}}\n' for number in range(50_000))
    source = Jsonl(path=str(file))
    tracemalloc.start()
    try:
        assert sum(1 for _ in source.examples("test")) > 4000
        source.content_hash()
        assert tracemalloc.get_traced_memory()[1] < 2e6  # bytes; the file has 12 million
    finally:
        tracemalloc.stop()


@pytest.mark.shared
def test_real_rows(shared_data: Path) -> None:
    source = Jsonl(path=str(shared_data / "gsm8k" / "train.jsonl"), instruction="question", response="answer")
    assert sum(1 for _ in source.rows()) == 7473
    assert not left_out(source)


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}


def chat_of(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def asked(content: str = "Weather?") -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_tools_calls_results_and_reasoning_are_kept(write_rows: WriteRows) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    messages = (
        asked(),
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "I must look."},
        {"role": "tool", "content": "20 °C", "name": "weather", "tool_call_id": None},
        {"role": "assistant", "content": "It is 20 °C.", "thinking": "Warm."},
    )
    rows = [chat_of(*messages, tools=tools), chat_of(*messages, tools=json.dumps(tools))]
    first, second = Jsonl(path=write_rows(rows), messages="messages").rows()
    assert first == second
    assert first.since == (Turn("assistant", "", "I must look.", (CALL,)), Turn("tool", "20 °C", name="weather"))
    assert (first.instruction, first.response, first.reasoning) == ("Weather?", "It is 20 °C.", "Warm.")
    assert first.tools == tuple(tools)


def test_an_answer_may_be_a_call_alone(write_rows: WriteRows) -> None:
    chat = chat_of(asked(), {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": "{}"}]})
    (example,) = Jsonl(path=write_rows([chat]), messages="messages").rows()
    assert example.tool_calls == ({"type": "function", "function": {"name": "weather", "arguments": "{}"}},)
    assert example.response == ""


@pytest.mark.parametrize(
    ("said", "weight"),
    [({"weight": 0}, 0), ({"train": False}, 0), ({"weight": 0.5}, 0.5), ({"train": True}, 1), ({"weight": None}, 1)],
)
def test_a_message_says_whether_it_is_learned(said: dict[str, Any], weight: float, write_rows: WriteRows) -> None:
    chat = chat_of(asked(), {"role": "assistant", "content": "3", **said}, w=2)
    (example,) = Jsonl(path=write_rows([chat]), messages="messages", weight="w").rows()
    assert example.weight == 2 * weight


def test_chats_that_open_alike_have_one_key(write_rows: WriteRows) -> None:
    def chat(city: str) -> dict[str, Any]:
        call = {"name": "weather", "arguments": {"city": city}}
        return chat_of(asked(), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "20"}, answer)

    answer = {"role": "assistant", "content": "20"}
    rows = [chat("Lima"), chat("Lima"), chat("Hanoi")]
    first, second, third = Jsonl(path=write_rows(rows), messages="messages").rows()
    assert first.key == second.key == third.key, "whatever was called since: a row of one must not be tested on the other"


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (
            [asked() | {"id": 3}, {"role": "assistant", "content": "x"}],
            "messages[0] has a key 'id' that is not read; take it out, or set data.ignored = [\"id\"]",
        ),
        (
            [{"role": "developer", "content": "x"}],
            "messages[0] is of role 'developer'; roles are system, user, assistant and tool",
        ),
        (
            [asked(), {"role": "tool", "content": "x"}],
            "messages[1] is of role 'tool', not 'assistant'; user and assistant take turns after an optional system, "
            "and tools answer calls",
        ),
        (
            [asked() | {"tool_calls": [CALL]}],
            "messages[0] is of role 'user', and only an assistant has tool_calls and reasoning",
        ),
        (
            [asked(), {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "<|im_end|>"}}]}],
            "messages[1]: 'tool_calls' must hold objects with function.name and function.arguments",
        ),
        (
            [asked(), {"role": "assistant", "content": "x", "weight": "0"}],
            "messages[1]: 'weight' must be a number of 0 or more",
        ),
        ([asked(), {"role": "assistant", "content": "x", "train": 0}], "messages[1]: 'train' must be true or false"),
    ],
)
def test_messages_that_cannot_be_read_are_named(messages: list[dict[str, Any]], told: str, write_rows: WriteRows) -> None:
    path = write_rows([chat_of(*messages)])
    assert complaint(path=path, messages="messages") == f"{path}:1: {told}"


def test_keys_are_passed_over_on_request(write_rows: WriteRows) -> None:
    path = write_rows([chat_of(asked() | {"id": 3}, {"role": "assistant", "content": "x", "id": 4})])
    assert len(list(Jsonl(path=path, messages="messages", ignored=("id",)).rows())) == 1
