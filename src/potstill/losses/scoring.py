"""A model's own distribution at response tokens, without training."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.data.batches import Batch, micro_batches, pack
from potstill.edges.families import logits_of
from potstill.losses.head import logit_chunks, response_hidden

MAX_TOKENS = 8192  # of one forward pass
MOST_STATES = 2 << 30  # bytes of a teacher's hidden states that are kept


States = dict[bytes, Tensor]  # the tokens of a pass -> a teacher's hidden states [N, D] at its response positions


def token_sums(
    model: Any,
    teacher: Any | None,
    pairs: Sequence[Any],
    vocab: int,
    measures: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]],
    states: States | None = None,
) -> dict[str, list[float]]:
    """For each measure of (log q, target, log p), its sum over each row's response tokens.

    Args:
        states: of this teacher; what is found there is not computed again, what is not is added, up to `MOST_STATES` bytes.
    """
    sums = {name: [0.0] * len(pairs) for name in measures}
    lengths = [len(prompt) + len(response) for prompt, response in pairs]
    with torch.inference_mode():
        for rows in micro_batches(lengths, MAX_TOKENS):
            batch = pack([pairs[row] for row in rows]).to(model.device)
            hidden_ND = response_hidden(model, batch)
            teacher_ND = _heard(teacher, batch, states) if teacher is not None else None
            for tokens, logits_CV in logit_chunks(hidden_ND, model.get_output_embeddings(), form=logits_of(model.config)):
                logq_CV = F.log_softmax(logits_CV[:, :vocab], dim=-1)
                logp_CV = None
                if teacher is not None and teacher_ND is not None:
                    ((_, theirs_CV),) = logit_chunks(
                        teacher_ND[tokens], teacher.get_output_embeddings(), logits_CV.shape[0], logits_of(teacher.config)
                    )
                    logp_CV = F.log_softmax(theirs_CV[:, :vocab], dim=-1)
                for name, measure in measures.items():
                    values = measure(logq_CV, batch.target_N[tokens], logp_CV).tolist()
                    for row, value in zip(batch.row_N[tokens].tolist(), values, strict=True):
                        sums[name][rows[row]] += value
    return sums


def _heard(teacher: Any, batch: Batch, states: States | None) -> Tensor:
    if states is None:
        return response_hidden(teacher, batch)
    key = batch.key()
    if key in states:
        return states[key].to(batch.ids_T.device)
    found = response_hidden(teacher, batch)
    if sum(t.nbytes for t in states.values()) + found.nbytes <= MOST_STATES:
        states[key] = found.cpu()
    return found


def mean_nll(model: Any, pairs: Sequence[Any]) -> float:
    """Nats per response token."""
    vocab = model.get_output_embeddings().weight.shape[0]
    sums = token_sums(model, None, pairs, vocab, {"nll": lambda logq, target, _: -logq.gather(-1, target[:, None]).squeeze(-1)})
    return sum(sums["nll"]) / sum(len(response) for _, response in pairs)
