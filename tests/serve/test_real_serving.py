"""SmolLM2 served by both engines."""

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import openai
import pytest
from serving import offer, serving

from potstill.serve.shelf import Opening, drafter_of, open_offer

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


def test_the_answers_with_its_four_bit_self_as_draft_are_those_without(tmp_path: Path) -> None:
    import torch

    from potstill.edges.models import load_stored, load_tokenizer
    from potstill.exporters.gguf import Gguf
    from potstill.quant.rounding import round_to_nearest

    whole = offer(f"{REAL}/smollm2", "smollm2")
    tokenizer, model = load_tokenizer(whole.where), load_stored(whole.where)
    (file,) = Gguf(types=("f16",)).write(model, tokenizer, {}, tmp_path)
    linear = {name: layer for name, layer in model.named_modules() if ".layers." in name and isinstance(layer, torch.nn.Linear)}
    packed = {name: round_to_nearest(layer.weight.float()) for name, layer in linear.items()}
    model = model.float()
    for name, layer in linear.items():
        layer.weight.data = packed[name].dequantise()
    (small,) = Gguf().write(model, tokenizer, packed, tmp_path)
    opening, served = Opening("llama.cpp", context=512, streams=2, threads=1), replace(whole, file=file)
    found = {}
    for drafter in (None, drafter_of(served, replace(whole, id="four", file=small), opening, 3)):
        opened = open_offer(served, opening, drafter)
        with (
            serving([served], opened=opened, opening=opening) as site,
            openai.OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0) as client,
        ):
            texts = []
            for question in QUESTIONS:
                asked = {"model": "smollm2", "messages": [{"role": "user", "content": question}], "max_tokens": 24}
                answer = client.chat.completions.create(**asked)
                texts.append(answer.choices[0].message.content)
                details = answer.usage.completion_tokens_details
                assert (details is not None and details.accepted_prediction_tokens > 0) is (drafter is not None)
            found[drafter is not None] = texts
    assert found[True] == found[False]
