"""The tokens after which a program must stop generating."""

from typing import Any

from potstill.data.prompts import end_of_turn


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer, most specific first: the chat template's end of turn, the model's own, end of sequence.

    A model that was never trained here often names its end of sequence alone, and would talk past its turn.
    """
    own = model.generation_config.eos_token_id
    ends = [end_of_turn(tokenizer), *(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return list(dict.fromkeys(end for end in ends if end is not None))
