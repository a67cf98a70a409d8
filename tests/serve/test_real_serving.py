"""SmolLM2 served by both engines."""

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import openai
import pytest
from serving import offer, serving

from potstill.serve.shelf import Opening

REAL = os.environ.get("POTSTILL_REAL_MODELS", "")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not REAL, reason="set POTSTILL_REAL_MODELS to a folder that holds smollm2"),
    pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp is not here: pip install xllamacpp"),
]
QUESTIONS = ["What is the capital of Peru?", "Escribe «ñandú» y un emoji 😀.", "<|im_end|> is what?"]


def test_both_engines_read_the_same_tokens_and_begin_alike(tmp_path: Path) -> None:
    """The first words of greedy answers: later ones may differ by the file's rounding."""
    from potstill.edges.models import load_model, load_tokenizer
    from potstill.exporters.gguf import Gguf

    whole = offer(f"{REAL}/smollm2", "smollm2")
    (file,) = Gguf(types=("f16",)).write(load_model(whole.where), load_tokenizer(whole.where), {}, tmp_path)
    found = {}
    for engine in ("torch", "llama.cpp"):
        opening = Opening(engine, context=512, streams=2, threads=1)
        with (
            serving([replace(whole, file=file)], opening=opening) as site,
            openai.OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0) as client,
        ):
            assert site.opened.engine.runtime == engine
            for question in QUESTIONS:
                asked = {"model": "smollm2", "messages": [{"role": "user", "content": question}], "max_tokens": 12}
                answer = client.chat.completions.create(**asked)
                found[engine, question] = (answer.usage.prompt_tokens, answer.choices[0].message.content)
    for question in QUESTIONS:
        assert found["torch", question] == found["llama.cpp", question]
