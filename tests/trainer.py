"""What a trainer sees of tokens that an engine drew."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.data.batches import StepRow, packed_rows
from potstill.edges.decoding import undisturbed
from potstill.edges.families import logits_of
from potstill.edges.packed import packs
from potstill.losses.head import logit_chunks, response_hidden
from potstill.losses.scoring import MAX_TOKENS


def sequence_logp(model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float = 1.0) -> list[Tensor]:
    """The model's own log-probability of each response token of (prompt, response): float32 [N] for each row, no gradient.

    log softmax(z / temperature) over the whole vocabulary, by the forward pass that training makes: so it is what a trainer
    sees of tokens that an engine drew. It does not know of `top_k`, `top_p` and `min_p`, by which an engine's own are larger.
    A row may have no response token. Whatever dropout the model trains with is off.

    Args:
        temperature: of the sampling; at 0 the engine's are those of temperature 1, and so are these.

    Raises:
        UserError: a row is longer than the model's positions.
    """
    found = [torch.empty(0)] * len(pairs)
    spoken = [row for row, (_, response) in enumerate(pairs) if len(response)]
    with undisturbed(model):
        for group, laid in packed_rows([StepRow(*pairs[row]) for row in spoken], MAX_TOKENS, share=packs(model)):
            rows, batch = [spoken[i] for i in group], laid.to(model.device)
            logp_N = torch.cat(
                [
                    F.log_softmax(logits_CV / (temperature or 1.0), dim=-1).gather(-1, batch.target_N[tokens, None]).squeeze(-1)
                    for tokens, logits_CV in logit_chunks(
                        response_hidden(model, batch), model.get_output_embeddings(), form=logits_of(model.config)
                    )
                ]
            )
            for row, of_row_N in zip(rows, logp_N.float().cpu().split(batch.responses), strict=True):
                found[row] = of_row_N.clone()
    return found
