"""A model's own distribution at response tokens, without training."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.train.batches import Batch, collate
from potstill.train.objectives import response_logits


def response_batches(pairs: Sequence[Any], max_tokens: int = 8192) -> Iterator[tuple[list[int], Batch]]:
    """Batches of (prompt, response) pairs by length, with the indices of their rows."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    group: list[int] = []
    for i in order:
        if group and (len(group) + 1) * (len(pairs[i][0]) + len(pairs[i][1])) > max_tokens:
            yield group, collate([pairs[j] for j in group])
            group = []
        group.append(i)
    if group:
        yield group, collate([pairs[j] for j in group])


def token_sums(
    model: Any,
    teacher: Any | None,
    pairs: Sequence[Any],
    vocab: int,
    measures: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]],
) -> dict[str, list[float]]:
    """For each measure of (log q, target, log p), its sum over each row's response tokens."""
    sums = {name: [0.0] * len(pairs) for name in measures}
    with torch.inference_mode():
        for rows, cpu_batch in response_batches(pairs):
            batch = cpu_batch.to(model.device)
            logq_NV = F.log_softmax(response_logits(model, batch, vocab), dim=-1)
            logp_NV = F.log_softmax(response_logits(teacher, batch, vocab), dim=-1) if teacher is not None else None
            for name, measure in measures.items():
                values = measure(logq_NV, batch.target_N, logp_NV).double()
                totals = torch.zeros(len(rows), dtype=torch.float64, device=values.device).index_add_(0, batch.row_N, values)
                for row, value in zip(rows, totals.tolist(), strict=True):
                    sums[name][row] = value
    return sums


def mean_nll(model: Any, pairs: Sequence[Any]) -> float:
    """Nats per response token."""
    vocab = model.get_output_embeddings().weight.shape[0]
    sums = token_sums(model, None, pairs, vocab, {"nll": lambda logq, target, _: -logq.gather(-1, target[:, None]).squeeze(-1)})
    return sum(sums["nll"]) / sum(len(response) for _, response in pairs)
