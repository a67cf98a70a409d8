"""A conversation with a model of a run or with a GGUF file, in the terminal."""

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import randbits, token_urlsafe
from typing import Any

from potstill.core.errors import UserError
from potstill.core.types import Example, Turn
from potstill.data.prompts import TOO_LONG, Prompts, Renderer
from potstill.data.templates import opened_tag
from potstill.edges.llamacpp import THREADS, Refused, runtime_problem, served
from potstill.edges.llamacpp_stream import TokenStream, Wish
from potstill.edges.models import config_of, load_model, load_tokenizer, positions_of
from potstill.edges.sampling import hidden_tokens, stream
from potstill.run.models import pick, talks_in_turns
from potstill.stages.lineage import as_chosen
from potstill.stages.verified import refuse_changed, written_as

CONTEXT = 4096  # tokens of a prompt and its answer, where the model has positions for them and nobody asks for others
LEAVE = ("quit", "exit", ":q", "quit()", "exit()", "/quit", "/exit", "/bye")  # as other programs are left


@dataclass(frozen=True)
class _Voice:
    """A model that answers in the terminal.

    Attributes:
        title: the first line of a conversation.
        limit: tokens of a prompt and its answer.
        wider: whether the model could hold more of them.
        in_turns: whether it hears what was said before.
        speak: the pieces of an answer to a prompt of so many tokens at most; closing it ends the answer.
    """

    title: str
    renderer: Renderer
    limit: int
    wider: bool
    in_turns: bool
    speak: Callable[[list[int], int], Generator[str, None, None]]


def chat_with(
    target: str, *, temperature: float, max_new_tokens: int, question: str | None, context: int | None = None
) -> None:
    """Read questions, stream answers, until an empty line, `quit`, `exit` or Ctrl-D; Ctrl-C ends an answer.

    Args:
        context: tokens of a prompt and its answer, the conversation before it included; None: `CONTEXT` at most.

    Raises:
        UserError: no such model or file, it is damaged, or it has too few positions.
    """
    of = _of_file if target.lower().endswith(".gguf") else _of_run
    with of(target, temperature, context) as voice:
        if question is not None:
            _answered(voice, question, (), max_new_tokens, may_stop=False)
        else:
            _converse(voice, max_new_tokens)


def _converse(voice: _Voice, max_new_tokens: int) -> None:
    history: tuple[Turn, ...] = ()
    print(voice.title)
    print("an empty line, quit, exit or Ctrl-D ends the conversation; Ctrl-C ends an answer")
    while True:
        try:
            asked = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not asked or asked.lower() in LEAVE:
            return
        said = _answered(voice, asked, history, max_new_tokens, may_stop=True)
        if said and voice.in_turns:
            history = (*history, Turn("user", asked), Turn("assistant", said.strip()))


def _answered(voice: _Voice, asked: str, history: tuple[Turn, ...], max_new_tokens: int, *, may_stop: bool) -> str:
    """What the model says, which is written as it comes."""
    example = Example(key="", instruction=asked, response="", history=history)
    prompt = voice.renderer.prompt(example)
    if prompt.ids is None and prompt.reason != TOO_LONG:
        raise UserError(f"that {prompt.reason}; write it otherwise")
    if prompt.ids is None or len(prompt.ids) >= voice.limit:
        remedy = "start again with less" + (", or with a larger --context" if voice.wider else "")
        raise UserError(f"that is longer than the {voice.limit:,} tokens of this conversation; {remedy}")
    opened = opened_tag(voice.renderer.text(example, ""))  # the prompt opens the answer's thinking
    room = min(max_new_tokens, voice.limit - len(prompt.ids))
    return opened + _spoken(voice.speak(prompt.ids, room), may_stop=may_stop)


@contextmanager
def _of_run(target: str, temperature: float, context: int | None) -> Iterator[_Voice]:
    artifact = as_chosen(pick(target))
    where = f"path:{Path(artifact.folder)}"
    prompts = Prompts.model_validate(artifact.stage.get("prompts", {}))
    limit = _limit(config_of(where), context, artifact.name)
    title = f"{artifact.name} ({artifact.summary.get('parameters', 0):,} parameters)"
    yield _by_torch(where, title, prompts, limit, talks_in_turns(artifact) and prompts.format == "chat", temperature)


def _limit(config: Any, asked: int | None, who: str) -> int:
    """Tokens of a prompt and its answer.

    Raises:
        UserError: the model has fewer positions than are asked for.
    """
    positions = positions_of(config)
    if asked is not None and positions is not None and asked > positions:
        raise UserError(f"--context {asked}: {who} has {positions:,} positions; set it to at most {positions}")
    return asked if asked is not None else min(positions or CONTEXT, CONTEXT)


def _wider(config: Any, limit: int) -> bool:
    positions = positions_of(config)
    return positions is None or positions > limit


def _by_torch(where: str, title: str, prompts: Prompts, limit: int, in_turns: bool, temperature: float) -> _Voice:
    tokenizer, model = load_tokenizer(where), load_model(where)
    renderer = _renderer(tokenizer, prompts, limit)

    def speak(ids: list[int], room: int) -> Generator[str, None, None]:
        return stream(model, tokenizer, ids, stop_ids=renderer.stop_ids, max_new_tokens=room, temperature=temperature)

    return _Voice(title, renderer, limit, _wider(model.config, limit), in_turns, speak)


@contextmanager
def _of_file(target: str, temperature: float, context: int | None) -> Iterator[_Voice]:
    """A GGUF file with its own chat template, by llama.cpp where that is here."""
    file = Path(target).expanduser()
    if not file.is_file():
        raise UserError(f"{target}: no such file; give a RUN[:MODEL] or the path of a .gguf file")
    refuse_changed(file)
    where = f"path:{file}"
    limit = _limit(config_of(where), context, file.name)
    problem = runtime_problem()
    if problem is not None:
        yield _by_torch(where, f"{file.name}, computed by torch: {problem}", Prompts(), limit, True, temperature)
        return
    tokenizer = load_tokenizer(where)
    renderer = _renderer(tokenizer, Prompts(), limit)
    hidden = frozenset(hidden_tokens(tokenizer, renderer.stop_ids))
    with ExitStack() as held:
        try:
            keys = [key := token_urlsafe(24)]
            server = held.enter_context(
                served(file, context=limit, threads=THREADS, keys=keys, doubted=written_as(file) is None)
            )
        except Refused as error:
            raise UserError(f"{file}: llama.cpp does not take it ({error}); export or download it again") from error

        def speak(ids: list[int], room: int) -> Generator[str, None, None]:
            wish = Wish(room, temperature, seed=randbits(32))
            try:
                for heard in TokenStream(server.url, ids, wish, tokenizer, key=key, hidden=hidden):
                    yield heard.text
            except Refused as error:
                raise UserError(f"{file}: llama.cpp broke off ({error}); start again") from error

        yield _Voice(
            f"{file.name}, {limit:,} tokens of context, by llama.cpp",
            renderer,
            limit,
            _wider(config_of(where), limit),
            True,
            speak,
        )


def _renderer(tokenizer: Any, prompts: Prompts, limit: int) -> Renderer:
    return Renderer(tokenizer, prompts.model_copy(update={"max_prompt_tokens": limit - 8, "max_tokens": limit}))


def _spoken(pieces: Generator[str, None, None], *, may_stop: bool) -> str:
    """Write the pieces of an answer as they come; with `may_stop`, Ctrl-C ends it and what was said so far is the answer."""
    said = ""
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
            said += piece
    except KeyboardInterrupt:
        if not may_stop:
            raise
        sys.stdout.write(" …")
    finally:
        pieces.close()  # or the model would go on in its thread
    print()
    return said
