"""A conversation with a model of a run, in the terminal."""

import sys
from collections.abc import Generator
from pathlib import Path

from potstill.core.artifact import Artifact
from potstill.core.component import suggest
from potstill.core.errors import UserError
from potstill.core.types import Example, Turn
from potstill.data.prompts import Prompts, Renderer
from potstill.data.templates import opened_tag
from potstill.edges.models import load_model, load_tokenizer
from potstill.edges.sampling import stream
from potstill.run.folder import find_run, stages_of, whole
from potstill.stages.lineage import as_chosen

LEAVE = ("quit", "exit", ":q", "quit()", "exit()", "/quit", "/exit", "/bye")  # as other programs are left


def pick(target: str) -> Artifact:
    """The model artifact that `RUN[:MODEL]` names; without a name the last distilled, else the last; of the first seed.

    Raises:
        UserError: no such run, no such model, or its files are damaged.
    """
    folder, _, name = target.partition(":")
    run = find_run(folder)
    return whole(run, _named(run, name))


def _named(run: Path, name: str) -> Artifact:
    stages = stages_of(run)
    finished = {ident: artifact for ident, artifact in stages.items() if artifact is not None}
    models = {ident: artifact for ident, artifact in finished.items() if artifact.makes == "model"}
    if not name:
        distilled = [ident for ident, artifact in models.items() if (artifact.summary.get("trained") or {}).get("teacher")]
        name = next(reversed(distilled or [*models]), "").partition("@")[0]
    if not models:
        waiting = f" yet; unfinished: {', '.join(ident for ident in stages if ident not in finished)}"
        raise UserError(f"{run}: the run made no model{waiting if len(finished) < len(stages) else ''}")
    of_name = [ident for ident in stages if name in (ident, ident.partition("@")[0])]
    there = [ident for ident in of_name if ident in models]
    if there:
        return models[there[0]]
    if any(ident not in finished for ident in of_name):
        has = f"(it has: {', '.join(models)})"
        raise UserError(f"{run}: '{name}' is not finished, or its manifest is damaged; run the recipe again {has}")
    raise UserError(f"{run}: no model '{name}'{suggest(name, models)} (it has: {', '.join(models)})")


def chat_with(target: str, *, temperature: float, max_new_tokens: int, question: str | None) -> None:
    """Read questions, stream answers, until an empty line, `quit`, `exit` or Ctrl-D; Ctrl-C ends an answer."""
    artifact = as_chosen(pick(target))
    where = f"path:{Path(artifact.folder)}"
    tokenizer, model = load_tokenizer(where), load_model(where)
    prompts = Prompts.model_validate(artifact.stage.get("prompts", {}))
    limit = model.config.max_position_embeddings
    renderer = Renderer(tokenizer, prompts.model_copy(update={"max_prompt_tokens": limit - 8, "max_tokens": limit}))
    history: tuple[Turn, ...] = ()

    def answer(asked: str) -> str:
        example = Example(key="", instruction=asked, response="", history=history)
        prompt = renderer.prompt(example)
        if prompt.ids is None:
            raise UserError(f"that is longer than the model's {limit} positions; start again with less")
        opened = opened_tag(renderer.text(example, ""))  # the prompt opens the answer's thinking
        room = min(max_new_tokens, limit - len(prompt.ids))
        pieces = stream(model, tokenizer, prompt.ids, stop_ids=renderer.stop_ids, max_new_tokens=room, temperature=temperature)
        return opened + _spoken(pieces, may_stop=question is None)

    if question is not None:
        answer(question)
        return
    print(f"{artifact.name} ({artifact.summary.get('parameters', 0):,} parameters)")
    print("an empty line, quit, exit or Ctrl-D ends the conversation; Ctrl-C ends an answer")
    while True:
        try:
            asked = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not asked or asked.lower() in LEAVE:
            return
        said = answer(asked)
        if said and prompts.format == "chat" and talks_in_turns(artifact):
            history = (*history, Turn("user", asked), Turn("assistant", said.strip()))


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


def talks_in_turns(artifact: Artifact) -> bool:
    """Whether the model was trained on more than single questions."""
    data = artifact.stage.get("data") or {}
    return bool(data.get("messages"))
