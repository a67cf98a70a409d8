"""What a plan advises where memory is short is what has not been done yet."""

import pytest

from potstill.stages.cost import less_memory
from potstill.train.loop import Optim

LOWER, AGAIN, ADAPT = "lower optim.micro_batch_tokens", "set optim.activation_checkpointing", "train with `adapter`"


@pytest.mark.parametrize(
    ("again", "adaptable", "told"),
    [
        (False, True, f"{LOWER}, {AGAIN}, or {ADAPT}"),
        (False, False, f"{LOWER} or {AGAIN}"),
        (True, True, f"{LOWER} or {ADAPT}"),
        (True, False, LOWER),
    ],
)
def test_what_is_done_already_is_not_advised(again: bool, adaptable: bool, told: str) -> None:
    assert less_memory(Optim(activation_checkpointing=again), adaptable) == told
