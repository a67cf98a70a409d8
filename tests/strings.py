"""Eighty texts on which tokenizers disagree, in NFC, and random ones."""

import random

from potstill.data.tricky import TEXTS as TEXTS

assert len(set(TEXTS)) >= 80


def random_texts(count: int, signs: str, longest: int = 40, seed: int = 0) -> list[str]:
    """Texts of these signs in any order, where merges compete."""
    draw = random.Random(seed)
    return ["".join(draw.choice(signs) for _ in range(draw.randint(1, longest))) for _ in range(count)]
