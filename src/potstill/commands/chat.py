"""A conversation with a model of a run, in the terminal."""

import sys
from pathlib import Path

from potstill.core.artifact import Artifact
from potstill.core.component import suggest
from potstill.core.errors import UserError
from potstill.core.types import Example, Turn
from potstill.data.prompts import Prompts, Renderer
from potstill.data.templates import opened_tag
from potstill.edges.models import load_model, load_tokenizer
from potstill.edges.sampling import stream
from potstill.run.runner import artifacts_of, find_run
from potstill.stages.lineage import as_chosen


def pick(target: str) -> Artifact:
    """The model artifact that `RUN[:MODEL]` names; without a name the last distilled, else the last; of the first seed.

    Raises:
        UserError: no such run, no such model.
    """
    run, _, name = target.partition(":")
    models = {ident: a for ident, a in artifacts_of(find_run(run)).items() if a.makes == "model"}
    if not models:
        raise UserError(f"{run}: the run made no model")
    if name:
        if name in models:
            return models[name]
        seeded = [a for ident, a in models.items() if ident.partition("@")[0] == name]
        if not seeded:
            raise UserError(f"{run}: no model '{name}'{suggest(name, models)} (it has: {', '.join(models)})")
        return seeded[0]
    stages = [ident.partition("@")[0] for ident, a in models.items() if as_chosen(a).kind == "distill"] or [*models]
    return next(a for ident, a in models.items() if ident.partition("@")[0] == stages[-1].partition("@")[0])


def chat_with(target: str, *, temperature: float, max_new_tokens: int, question: str | None) -> None:
    """Read questions, stream answers; an empty line, `quit` or Ctrl-D ends it."""
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
        words = opened_tag(renderer.text(example, ""))  # the prompt opens the answer's thinking
        room = min(max_new_tokens, limit - len(prompt.ids))
        for piece in stream(
            model, tokenizer, prompt.ids, stop_ids=renderer.stop_ids, max_new_tokens=room, temperature=temperature
        ):
            sys.stdout.write(piece)
            sys.stdout.flush()
            words += piece
        print()
        return words

    if question is not None:
        answer(question)
        return
    print(
        f"{artifact.name} ({artifact.summary.get('parameters', 0):,} parameters); an empty line or `quit` ends the conversation"
    )
    while True:
        try:
            asked = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not asked or asked in ("quit", "exit", "/quit", "/exit", "/bye"):
            return
        said = answer(asked)
        if prompts.format == "chat" and _talks_in_turns(artifact):
            history = (*history, Turn("user", asked), Turn("assistant", said.strip()))


def _talks_in_turns(artifact: Artifact) -> bool:
    """Whether the model was trained on more than single questions."""
    data = artifact.stage.get("data") or {}
    return bool(data.get("messages"))
