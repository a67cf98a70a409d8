"""llama.cpp for tests: what the product asks of it, in the words that tests use."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from potstill.edges import llamacpp as runtime
from potstill.edges.llamacpp import Refused as Refused

needs_llamacpp = pytest.mark.skipif(
    runtime.runtime_problem() is not None, reason=runtime.runtime_problem() or "llama.cpp is here"
)


def ask(
    file: Path,
    prompts: Sequence[list[int]] = (),
    texts: Sequence[str] = (),
    words: int = 0,
    spelt: Sequence[list[int]] = (),
) -> dict[str, Any]:
    """`answers_of` as a dict: `logp` by token id, `ids`, `texts`, `answers` (greedy text and why it ended), `props`."""
    asked: dict[str, Any] = {"continued": prompts, "words": words} if words else {"prompts": prompts}
    found = runtime.answers_of(file, texts=texts, spelt=spelt, **asked)
    logp = [{id: value for id, value in enumerate(logp_V.tolist()) if not math.isnan(value)} for logp_V in found.logp_V]
    answers = [list(written) for written in found.written]
    return {"logp": logp, "ids": found.ids, "texts": found.texts, "answers": answers, "props": found.props}


@contextmanager
def served(file: Path, positions: int = 0) -> Iterator[str]:
    """Where llama.cpp's server answers OpenAI's API for a file, while inside.

    Args:
        positions: of its context; 0: the model's own.
    """
    with runtime.served(file, context=positions, kv="f32", warmup=False) as server:
        yield f"{server.url}/v1"
