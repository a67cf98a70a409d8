"""Speculative decoding by transformers: a small model drafts, its teacher checks several tokens in one pass."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from potstill.core.errors import UserError
from potstill.edges.models import Model
from potstill.edges.sampling import check_room, plain_defaults


@dataclass(frozen=True)
class Drafting:
    """What came of one answer.

    Attributes:
        accepted, refused: drafted tokens that the teacher looked at; those after a refused one it did not.
        passes: of the teacher, each of which gives one token more than it accepts.
        tokens: of the answer.
        seconds, alone_seconds: with the draft model, and by the teacher without one; prompt included.
        alone_tokens: of the teacher's answer without one.
    """

    accepted: int
    refused: int
    passes: int
    tokens: int
    seconds: float
    alone_tokens: int
    alone_seconds: float


def check_draft(student: Model, teacher: Model) -> None:
    """Refuse a pair that transformers cannot couple.

    Raises:
        UserError: their embeddings have different numbers of rows.
    """
    ours, theirs = (model.get_input_embeddings().weight.shape[0] for model in (student, teacher))
    if ours != theirs:
        raise UserError(
            f"a draft model needs its teacher's vocabulary: {ours:,} rows of embeddings against {theirs:,}; "
            "leave the metrics speculative and draft_acceptance out"
        )


def draft_answer(
    student: Model,
    teacher: Model,
    prompt: Sequence[int],
    *,
    drafts: int,
    new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
) -> Drafting:
    """The teacher's sampled answer to a prompt, with the student's drafts and without; text is distributed as the teacher's.

    Args:
        drafts: tokens that the student writes before the teacher looks.
        new_tokens: longest answer.

    Raises:
        UserError: as `check_draft`; the prompt and the answer do not fit into one of the models.
    """
    import torch

    check_draft(student, teacher)
    for model, who in ((student, "the model"), (teacher, "the teacher")):
        check_room(model, len(prompt), new_tokens + drafts + 1, who)
    ids_BT = torch.tensor([list(prompt)], device=teacher.device)
    arguments = {
        "attention_mask": torch.ones_like(ids_BT),
        "do_sample": True,
        "temperature": temperature,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": new_tokens,
        "pad_token_id": stop_ids[0] if stop_ids else 0,
        "eos_token_id": list(stop_ids) or None,
    }

    def timed(**more: Any) -> tuple[int, float]:
        torch.manual_seed(seed)
        begin = time.perf_counter()
        length = teacher.generate(ids_BT, **arguments, **more).shape[1]
        if teacher.device.type == "cuda":
            torch.cuda.synchronize()
        return length - len(prompt), time.perf_counter() - begin

    cuda = [teacher.device] if teacher.device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.inference_mode(), plain_defaults(teacher), plain_defaults(student):
        student.generation_config.num_assistant_tokens = drafts
        student.generation_config.num_assistant_tokens_schedule = "constant"
        student.generation_config.assistant_confidence_threshold = 0.0  # or it stops where it is unsure, and drafts less
        with _watched(teacher) as looks:
            tokens, seconds = timed(assistant_model=student)
        alone_tokens, alone_seconds = timed()
    accepted, refused = _accepted(looks, len(prompt) + tokens)
    return Drafting(accepted, refused, len(looks), tokens, seconds, alone_tokens, alone_seconds)


@contextmanager
def _watched(teacher: Model) -> Iterator[list[tuple[int, int]]]:
    """Of each pass of the teacher while inside: how long the text was, and how many drafted tokens came after it."""
    looks: list[tuple[int, int]] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        places: Any = kwargs.get("position_ids", kwargs.get("cache_position"))  # older releases give the latter
        whole = int(places.flatten()[-1]) + 1
        drafted = kwargs["logits_to_keep"] - 1
        looks.append((whole - drafted, drafted))

    hook = teacher.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield looks
    finally:
        hook.remove()


def _accepted(looks: Sequence[tuple[int, int]], end: int) -> tuple[int, int]:
    """Drafted tokens that were accepted, and passes that refused one.

    Args:
        end: length of the finished text.
    """
    accepted = refused = 0
    for (length, drafted), after in zip(looks, [*(length for length, _ in looks[1:]), end], strict=True):
        kept = min(after - length, drafted)  # one more than the accepted, unless the answer ended within the draft
        whole = after - length == drafted + 1
        accepted += drafted if whole else max(kept - 1, 0)
        refused += 0 if whole else 1
    return accepted, refused
