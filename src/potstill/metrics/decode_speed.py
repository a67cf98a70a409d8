"""Decoding speed."""

from typing import Any, ClassVar

from pydantic import Field

from potstill.metrics import ModelMetric

_BEGIN = 4  # positions of the prompt, "The" with what a tokenizer begins with, and of the first token, which is not timed


class DecodeSpeed(ModelMetric, kind="decode_speed"):
    """Tokens per second of greedy decoding for one sequence in PyTorch, prompt excluded: the best of some repeats.

    A 4-bit row runs on its dequantised weights here, so it is no faster than the full one; a 4-bit runtime is.
    """

    unit: ClassVar[str] = "tokens/s"
    title: ClassVar[str] = "Decode"

    new_tokens: int = Field(default=48, ge=2, description="tokens decoded per repeat")
    repeats: int = Field(default=5, ge=1, description="the fastest counts: other work disturbs it least")

    def tokens(self) -> int:
        return self.repeats * (self.new_tokens + 2) + 2

    def problems(self, config: Any) -> list[str]:
        from potstill.edges.models import positions_of

        limit = positions_of(config)
        if limit is None or self.new_tokens + _BEGIN <= limit:
            return []
        return [
            f"decode_speed.new_tokens = {self.new_tokens} is too much for {limit} positions; set it to at most {limit - _BEGIN}"
        ]

    def __call__(self, model: Any, tokenizer: Any) -> float:
        from potstill.edges.sampling import decode_speed
        from potstill.edges.tokens import begun, encode

        return decode_speed(model, begun(tokenizer, encode(tokenizer, "The")), self.new_tokens, self.repeats)
