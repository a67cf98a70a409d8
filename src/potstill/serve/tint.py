"""How far a student is from its teacher at each token of an answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from potstill.core.errors import UserError
from potstill.core.types import Example
from potstill.data.prompts import Prompts
from potstill.edges.models import Tokenizer, shared_vocabulary
from potstill.edges.spelling import Spelling
from potstill.teachers.reading import foreign_form


@dataclass(frozen=True)
class Tint:
    """An answer's pieces, each with its divergence.

    Attributes:
        pieces: text and KL(teacher ‖ student) in nats; of a character of several tokens the largest.
        mean: over all tokens, nats.
        note: what else should be known; "" where nothing.
    """

    pieces: list[tuple[str, float]]
    mean: float
    note: str


def divergences(student: Any, teacher: Any, prompt: Sequence[int], answer: Sequence[int], vocab: int) -> list[float]:
    """KL(teacher ‖ student) in nats at each token of an answer, over the whole vocabulary that they share: one pass of each.

    Args:
        vocab: leading token ids of both.
    """
    import torch
    import torch.nn.functional as F

    from potstill.data.batches import pack
    from potstill.divergences.forward_kl import ForwardKL
    from potstill.edges.families import logits_of
    from potstill.losses.head import logit_chunks
    from potstill.losses.scoring import response_hidden

    kl, found = ForwardKL(), list[float]()
    with torch.inference_mode():
        batch = pack([(list(prompt), list(answer))]).to(student.device)
        hidden_ND, theirs_ND = response_hidden(student, batch), response_hidden(teacher, batch)
        for tokens, logits_CV in logit_chunks(hidden_ND, student.get_output_embeddings(), form=logits_of(student.config)):
            ((_, theirs_CV),) = logit_chunks(
                theirs_ND[tokens], teacher.get_output_embeddings(), logits_CV.shape[0], logits_of(teacher.config)
            )
            logq_CV, logp_CV = (F.log_softmax(z_CV[:, :vocab].float(), dim=-1) for z_CV in (logits_CV, theirs_CV))
            found += kl(logp_CV, logq_CV).clamp(min=0).tolist()
    return found


def compared(student: Tokenizer, teacher: Tokenizer, prompts: Prompts, example: Example) -> tuple[int, str]:
    """The vocabulary that both share, and how their forms of this prompt differ; "" where they do not.

    Raises:
        UserError: their tokens differ, so that nothing can be compared token by token.
    """
    vocab = shared_vocabulary(teacher, student)
    words = foreign_form(student, teacher, prompts, [example], "student", "tint")
    return vocab, f"the teacher read the student's form of the prompt, which is not its own: {words}" if words else ""


def tint_of(tokenizer: Tokenizer, hidden: frozenset[int], ids: Sequence[int], nats: Sequence[float], note: str) -> Tint:
    """An answer's tokens and their divergences as pieces of text."""
    spelling, pieces, waiting = Spelling(tokenizer, hidden), list[tuple[str, float]](), 0.0
    for token, value in zip(ids, nats, strict=True):
        waiting = max(waiting, value)
        text = spelling.add(token)
        if text:
            pieces.append((text, round(waiting, 4)))
            waiting = 0.0
    rest = spelling.end()
    if rest:
        pieces.append((rest, round(waiting, 4)))
    return Tint(pieces, sum(nats) / len(nats) if nats else 0.0, note)


def tokens_of(tokenizer: Tokenizer, ids: Sequence[int], all_known: bool, text: str) -> tuple[list[int], str]:
    """The tokens of an answer, without the one that ended it, and a note where they are not those that were drawn: where some
    of these are not known, the text is cut into tokens again.

    Raises:
        UserError: it has none.
    """
    from potstill.edges import tokens

    found = list(ids) if all_known else tokens.encode(tokenizer, text)
    if not found:
        raise UserError("the answer is empty")
    return found, "" if all_known else "the answer was cut into tokens again"
