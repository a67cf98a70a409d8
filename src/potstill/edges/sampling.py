"""Answers from a model: many prompts at once, or one prompt as a stream."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from potstill.core.errors import UserError
from potstill.edges import tokens
from potstill.edges.decoding import BATCH_ROWS, draw_answers
from potstill.edges.drawing import Drawing
from potstill.edges.models import Model, Tokenizer, positions_of


@dataclass(frozen=True)
class Answers:
    """One answer per prompt, in the order of the prompts.

    Attributes:
        texts: without the stop token.
        cut: whether an answer reached `max_new_tokens` without a stop token.
        ids: the tokens of each, the stop token included.
    """

    texts: list[str]
    cut: list[bool]
    ids: list[list[int]]


def _arguments(max_new_tokens: int, stop_ids: list[int], temperature: float, pad_id: int) -> dict[str, Any]:
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {"do_sample": False}
    )
    return {"max_new_tokens": max_new_tokens, "eos_token_id": stop_ids, "pad_token_id": pad_id, "use_cache": True, **sampling}


@contextmanager
def plain_defaults(model: Model) -> Iterator[None]:
    """While inside, the decoding defaults that came with the checkpoint are not there to override ours in silence."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def check_room(model: Model, prompt_tokens: int, max_new_tokens: int, who: str = "the model") -> None:
    """Refuse what would run past the positions of `who`: GPT-2 dies of it, and others answer nonsense."""
    limit = positions_of(model.config)
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {prompt_tokens} tokens and an answer of up to max_new_tokens = {max_new_tokens} are more than "
            f"{who}'s {limit} positions; lower max_new_tokens or prompts.max_prompt_tokens"
        )


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    *,
    stop_ids: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_rows: int = BATCH_ROWS,
    on_rows: Callable[[int, int], None] | None = None,
) -> Answers:
    """One answer per prompt, greedy at temperature 0, else sampled over the whole vocabulary.

    See `draw_answers`. A row's sample follows from `seed` and its number alone. `on_rows` gets, after every new token, how many
    answers are finished, of how many.

    Raises:
        UserError: a prompt and its answer need more positions than the model has.
    """
    check_room(model, max(map(len, prompts), default=0), max_new_tokens)
    stop_ids = stops_of(model, tokenizer, stop_ids)
    found = draw_answers(
        model,
        prompts,
        stop_ids=stop_ids,
        max_new_tokens=max_new_tokens,
        drawing=Drawing(temperature),
        uniform=(lambda row, _: _uniform(seed, row, max_new_tokens)) if temperature > 0 else None,
        scored=False,
        most=batch_rows,
        on_ended=on_rows,
    )
    return Answers(
        [decode(tokenizer, each.ids, stop_ids) for (each,) in found],
        [not each.finished for (each,) in found],
        [each.ids for (each,) in found],
    )


def _uniform(seed: int, row: int, count: int) -> Any:
    """Numbers in [0, 1) of one row's own: its sample does not depend on the rows beside it."""
    import numpy as np

    return np.random.Generator(np.random.PCG64([seed, row])).random(count)


def stops_of(model: Model, tokenizer: Tokenizer, stop_ids: list[int]) -> list[int]:
    """The tokens that end an answer: the template's, the tokenizer's, and the model's own, of which it may have several."""
    own = sorted(_ends(tokenizer))
    for config in (model.generation_config, model.config):
        eos = getattr(config, "eos_token_id", None)
        own += eos if isinstance(eos, list | tuple) else [eos] if eos is not None else []
    return list(dict.fromkeys([*stop_ids, *own]))


def decode(tokenizer: Tokenizer, ids: list[int], stop_ids: list[int]) -> str:
    """Text up to the first token that ends or pads; added tokens are kept, those that begin or end turns are not."""
    ends = {*stop_ids} | _ends(tokenizer)
    ids = ids[: next((n for n, token in enumerate(ids) if token in ends), len(ids))]
    return tokens.decode(tokenizer, ids, hidden_tokens(tokenizer, stop_ids)).strip()


def _ends(tokenizer: Tokenizer) -> set[int]:
    """End of sequence and padding; a token that also begins texts ends an answer only where the model says so."""
    return tokens.end_tokens(tokenizer) - {tokenizer.bos_token_id}


def hidden_tokens(tokenizer: Tokenizer, stop_ids: list[int]) -> set[int]:
    """Tokens that an answer is shown without: they begin or end turns and texts."""
    return {*stop_ids} | tokens.turn_tokens(tokenizer) | tokens.end_tokens(tokenizer)


def stream(
    model: Model, tokenizer: Tokenizer, prompt: list[int], *, stop_ids: list[int], max_new_tokens: int, temperature: float
) -> Generator[str, None, None]:
    """The pieces of one answer as they come; closing it ends the answer. Errors as in `generate`."""
    from threading import Event, Thread

    import torch
    from transformers import TextIteratorStreamer

    check_room(model, len(prompt), max_new_tokens)
    stop_ids = stops_of(model, tokenizer, stop_ids)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    hidden = hidden_tokens(tokenizer, stop_ids)

    class Visible(TextIteratorStreamer):
        """Keeps added tokens, as `decode` does."""

        def put(self, value: Any) -> None:
            prompt = self.next_tokens_are_prompt
            if prompt or int(value.reshape(-1)[0]) not in hidden:
                super().put(value)

    streamer = Visible(tokenizer, skip_prompt=True, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    ids_BT = torch.tensor([prompt], device=model.device)
    arguments = _arguments(max_new_tokens, stop_ids, temperature, pad_id)
    failed: list[Exception] = []
    closed = Event()

    def is_closed(ids_BT: Any, scores: Any) -> Any:
        return torch.full((len(ids_BT),), closed.is_set(), device=ids_BT.device)

    arguments |= {"attention_mask": torch.ones_like(ids_BT), "streamer": streamer, "stopping_criteria": [is_closed]}

    def work() -> None:
        try:
            model.generate(ids_BT, **arguments)
        except Exception as error:
            failed.append(error)
            streamer.end()  # or the reader would wait for ever

    thread = Thread(target=work)
    with plain_defaults(model):
        thread.start()
        try:
            yield from streamer
        finally:
            closed.set()
            thread.join()
    if failed:
        raise failed[0]


def decode_speed(model: Model, prompt: list[int], new_tokens: int = 64, repeats: int = 3) -> float:
    """Tokens per second of greedy decoding for one sequence, prompt excluded: the best of some repeats, which other work on
    the machine disturbs least.

    Raises:
        UserError: as `generate`.
    """
    import time

    import torch

    check_room(model, len(prompt), new_tokens + 1)
    ids_BT = torch.tensor([prompt], device=model.device)
    arguments = {
        "attention_mask": torch.ones_like(ids_BT),
        "do_sample": False,
        "use_cache": True,
        "pad_token_id": 0,
        "eos_token_id": None,
    }

    def seconds(count: int) -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(ids_BT, max_new_tokens=count, min_new_tokens=count, **arguments)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    with torch.inference_mode(), plain_defaults(model):
        seconds(2)
        return new_tokens / min(max(seconds(new_tokens + 1) - seconds(1), 1e-9) for _ in range(repeats))
