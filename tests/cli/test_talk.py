"""Leaving a conversation, and text in brackets that must not be taken for markup."""

import io

import habits
import pytest
from tiny_parts import chat_tokenizer
from tiny_run import call

from potstill.core.errors import UserError
from potstill.core.types import Turn
from potstill.data.prompts import Prompts, Renderer


@pytest.mark.parametrize("word", ["quit", "exit", "QUIT", ":q", ""])
def test_leaving_a_conversation_asks_the_model_nothing(finished, word, monkeypatch, capsys):
    from potstill.commands.chat import chat_with

    monkeypatch.setattr("sys.stdin", io.StringIO(f"{word}\nWhat is 1 plus 1?\n"))
    chat_with(f"{finished.out}:sft", temperature=0.0, max_new_tokens=2, question=None)
    told = capsys.readouterr().out
    assert "an empty line, quit, exit or Ctrl-D ends the conversation; Ctrl-C ends an answer\n" in told
    assert told.count("> ") == 1


@pytest.mark.parametrize(
    "context, said, code",
    [
        (64, "", 0),
        (16, "that is longer than the 16 tokens of this conversation; start again with less, or with a larger --context", 2),
        (129, "--context 129: sft has 128 positions; set it to at most 128", 2),
    ],
)
def test_a_conversation_has_the_context_that_is_asked_for(finished, context, said, code):
    result = call("chat", f"{finished.out}:sft", "--prompt", "What is 1 plus 1?", "--context", str(context))
    assert (result.exit_code, said in result.stderr) == (code, True)


def test_a_question_that_the_template_cannot_hold_is_not_called_too_long():
    from potstill.commands.chat import _answered, _Voice

    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]})
    tokenizer.chat_template = habits.OPENS_THOUGHT
    voice = _Voice("", Renderer(tokenizer, Prompts()), 512, False, True, lambda ids, room: (said for said in ("Yes.",)))
    assert _answered(voice, "Why?", (), 4, may_stop=False).endswith("Yes.")
    with pytest.raises(UserError, match=r"^that spells a token that the chat template's own logic reads; write it otherwise$"):
        _answered(voice, "why </think> now?", (Turn("user", "?"), Turn("assistant", "!")), 4, may_stop=False)


def test_an_interrupted_answer_ends_and_the_conversation_goes_on(capsys):
    from potstill.commands.chat import _spoken

    closed = []

    def pieces():
        try:
            yield "so far"
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    assert _spoken(pieces(), may_stop=True) == "so far"
    assert closed == [True]
    with pytest.raises(KeyboardInterrupt):
        _spoken(pieces(), may_stop=False)


def test_doctor_prints_brackets_as_they_are(capsys):
    from potstill.commands.doctor import print_findings

    remedy = "pip install 'potstill[tensorboard]'"
    print_findings([{"name": "[red]", "ok": None, "found": "log = ['tensorboard']", "remedy": remedy}])
    told = capsys.readouterr().out
    assert all(text in told for text in ("[red]", "log = ['tensorboard']", remedy))
