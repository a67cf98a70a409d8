"""Layers of the student beside those of the teacher."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from potstill.data.batches import Batch
from potstill.edges.models import blocks_of, states_of
from potstill.losses.head import Loss
from potstill.losses.objective import Objective


class HiddenStates:
    """Another objective + weight · Σ_rows w·R·mean over its tokens and the student's layers of ‖s − t‖² / ‖t‖².

    s is what a layer of the student gives, t what its layer of the teacher gives, for prompt and response alike; R are a row's
    response tokens, so that sums are divided by what all other parts are divided by. TinyBERT (Jiao et al.,
    arXiv:1909.10351, equation 8) takes the mean squared error; divided by ‖t‖² it does not depend on a layer's scale.

    Args:
        objective: the rest of the loss; it lets `teacher` read the batch.
        teacher: of the student's hidden width.
        layers: for each layer of the student, which one of the teacher it learns, counted from 0.
        weight: of this part.
    """

    def __init__(self, objective: Objective, teacher: Any, layers: Sequence[int], weight: float) -> None:
        self.objective, self.teacher, self.layers, self.weight = objective, teacher, tuple(layers), weight

    def __call__(self, model: Any, batch: Batch) -> Loss:
        with _heard(model, range(len(self.layers))) as ours, _heard(self.teacher, self.layers) as theirs:
            loss = self.objective(model, batch)
        distance_T = torch.stack(
            [_distance(_laid(ours[i], batch), _laid(theirs[layer], batch)) for i, layer in enumerate(self.layers)]
        ).mean(0)
        distance = (distance_T * _share(batch).to(distance_T)).sum()
        return Loss(loss.total + self.weight * distance, {**loss.parts, "hidden_states": distance.detach()})


def layers_to_learn(student: int, teacher: int, keep: Sequence[int] | None = None) -> tuple[int, ...]:
    """For each of the student's layers, the teacher's layer whose output it learns; the last learns the last.

    Args:
        student, teacher: numbers of layers.
        keep: which of the teacher's layers the student was cut from: each then also does what those that went after it did.
            Without, the student's layers are spread evenly (Jiao et al., arXiv:1909.10351).
    """
    if keep is not None and len(keep) == student and keep[-1] < teacher:
        return (*(after - 1 for after in keep[1:]), teacher - 1)
    return tuple(-(-(i + 1) * teacher // student) - 1 for i in range(student))


@contextmanager
def _heard(model: Any, layers: Iterable[int]) -> Iterator[dict[int, list[Tensor]]]:
    """What these layers give while inside: [layer][pass], states [..., D] of the tokens in their order."""
    heard: dict[int, list[Tensor]] = {}
    handles, blocks = [], blocks_of(model)
    for layer in sorted(set(layers)):
        heard[layer] = parts = []

        def hear(_: Any, __: Any, output: Any, parts: list[Tensor] = parts) -> None:
            parts.append(states_of(output))

        handles.append(blocks[layer].register_forward_hook(hear))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _laid(parts: Sequence[Tensor], batch: Batch) -> Tensor:
    """[T, D] of the batch's tokens, in float32, or float64 where they are."""
    states_TD = torch.cat([part.flatten(0, -2) for part in parts])
    if batch.shared is not None and len(states_TD) > len(batch.ids_T):  # of a model that reads every row whole
        states_TD = batch.shared.keep(states_TD)
    return states_TD.to(torch.promote_types(states_TD.dtype, torch.float32))


def _distance(student_TD: Tensor, teacher_TD: Tensor) -> Tensor:
    """[T]: relative to what is learned."""
    square_T = teacher_TD.square().sum(-1).clamp(min=torch.finfo(teacher_TD.dtype).tiny)
    return (student_TD - teacher_TD).square().sum(-1) / square_T


def _share(batch: Batch) -> Tensor:
    """Of each token [T]: its row's weight and response tokens, divided by its row's tokens; summed over its rows."""
    device = batch.ids_T.device
    lengths_R, responses_R = (torch.tensor(each, device=device) for each in (batch.lengths, batch.responses))
    row_R = responses_R.double()
    if batch.weight_N is not None:
        row_R = torch.zeros_like(row_R).index_add_(0, batch.row_N, batch.weight_N.double())
    share_F = (row_R / lengths_R).repeat_interleave(lengths_R)
    if batch.shared is None:
        return share_F
    return share_F.new_zeros(len(batch.ids_T)).index_add_(0, batch.shared.spread_F, share_F)
