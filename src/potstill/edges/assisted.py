"""Speculative decoding by transformers: a small model drafts, its teacher checks several tokens in one pass."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from potstill.core.errors import UserError
from potstill.edges.models import Model
from potstill.edges.sampling import check_room, plain_defaults

_WARM_UP = 8  # tokens


@dataclass(frozen=True)
class Drafting:
    """What came of one answer.

    Attributes:
        accepted, refused: drafted tokens that the teacher looked at; neither those after a refused one nor those after the end.
        passes: of the teacher, each of which gives one token more than it accepts, but for one whose draft ends the answer.
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


def draft_answers(
    student: Model,
    teacher: Model,
    prompts: Sequence[Sequence[int]],
    *,
    drafts: int,
    new_tokens: int,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    watch: Callable[[int, int], None] = lambda done, of: None,
) -> list[Drafting]:
    """`draft_answer` of each prompt, with drafts first and without first in turn, after a short answer that is not measured.

    The first passes of a process are slow, and what runs second finds the caches filled: neither way has that for itself.

    Args:
        seed: of the first prompt; the next has the next one.
        watch: gets the number of finished answers, and of all.

    Raises:
        UserError: as `draft_answer`.
    """
    answer = partial(draft_answer, student, teacher, drafts=drafts, stop_ids=stop_ids)
    found: list[Drafting] = []
    for number, prompt in enumerate(prompts):
        watch(number, len(prompts))
        if not found:
            answer(prompt, new_tokens=min(new_tokens, _WARM_UP))
        found.append(answer(prompt, new_tokens=new_tokens, seed=seed + number, alone_first=number % 2 == 1))
    return found


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
    alone_first: bool = False,
) -> Drafting:
    """The teacher's sampled answer to a prompt, with the student's drafts and without; text is distributed as the teacher's.

    Args:
        drafts: tokens that the student writes before the teacher looks.
        new_tokens: longest answer.
        alone_first: the answer without drafts is written before the other.

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

    def timed(**more: Any) -> tuple[list[int], float]:
        torch.manual_seed(seed)
        begin = time.perf_counter()
        text_BT = teacher.generate(ids_BT, **arguments, **more)
        if teacher.device.type == "cuda":
            torch.cuda.synchronize()
        return text_BT[0, len(prompt) :].tolist(), time.perf_counter() - begin

    def drafted() -> tuple[list[int], float]:
        with _watched(teacher) as looks:
            done = timed(assistant_model=student)
        passes.extend(looks)
        return done

    passes: list[Any] = []
    cuda = [teacher.device] if teacher.device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.inference_mode(), plain_defaults(teacher), plain_defaults(student):
        student.generation_config.num_assistant_tokens = drafts
        student.generation_config.num_assistant_tokens_schedule = "constant"
        student.generation_config.assistant_confidence_threshold = 0.0  # or it stops where it is unsure, and drafts less
        if alone_first:
            (alone, alone_seconds), (text, seconds) = timed(), drafted()
        else:
            (text, seconds), (alone, alone_seconds) = drafted(), timed()
    accepted, refused = accepted_of([draft_T.tolist() for draft_T in passes], text)
    return Drafting(accepted, refused, len(passes), len(text), seconds, len(alone), alone_seconds)


@contextmanager
def _watched(teacher: Model) -> Iterator[list[Any]]:
    """The drafted ids [T] of each pass of the teacher while inside, on its device: reading them would wait for it."""
    drafts: list[Any] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids_BT, drafted = kwargs["input_ids"], kwargs["logits_to_keep"] - 1
        drafts.append(ids_BT[0, ids_BT.shape[1] - drafted :])

    hook = teacher.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield drafts
    finally:
        hook.remove()


def accepted_of(drafts: Sequence[Sequence[int]], text: Sequence[int]) -> tuple[int, int]:
    """Drafted tokens that were accepted, and refused ones, by what was written: what replaces a refused token is another one.

    Args:
        drafts: of each pass of the teacher.
        text: the whole answer.
    """
    accepted = refused = at = 0
    for draft in drafts:
        written = text[at : at + len(draft)]
        same = next((i for i, (ours, theirs) in enumerate(zip(draft, written, strict=False)) if ours != theirs), len(written))
        accepted += same
        refused += same < len(written)  # where the answer ends within the draft, nobody looked at the rest
        at += same + 1  # the token that replaces a refused one, or follows the draft
    return accepted, refused
