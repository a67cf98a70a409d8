"""What models take in memory and on disk, and what becomes of one that can no longer answer."""

import asyncio

import pytest
import torch
from family import build_model

from potstill.core.errors import UserError
from potstill.data.prompts import Prompts
from potstill.serve.offers import Offer
from potstill.serve.protocol import Refusal
from potstill.serve.shelf import Opening, Shelf, keys_and_values, open_offer


@pytest.fixture
def opened(pair):
    found = open_offer(pair[0], Opening("torch", context=256))
    yield found
    found.close()


def kept(model, tokens):
    """Bytes of a real cache."""
    with torch.inference_mode():
        cache = model(torch.ones(1, tokens, dtype=torch.long), use_cache=True).past_key_values
    return sum(one.nbytes for layer in cache.layers for one in (layer.keys, layer.values))


def test_keys_and_values_are_those_of_a_real_cache(tokenizer):
    model = build_model(tokenizer, layers=3)
    assert keys_and_values(model.config, 40, 4) == kept(model, 40) == 40 * 2 * 3 * 2 * 8 * 4
    assert keys_and_values(model.config, 40, 2) == kept(model.half(), 40)
    model.config.layer_types = ["full_attention", "sliding_attention", "linear_attention"]
    model.config.sliding_window = 16
    assert keys_and_values(model.config, 40, 4) == (40 + 16) * 2 * 2 * 8 * 4


def test_a_model_whose_keys_and_values_do_not_fit_is_refused_before_it_is_loaded(pair, opened):
    greedy = Opening("torch", context=8192, streams=10**6)
    words = r"student needs 0\.0 GB for its weights and \d+\.\d GB for keys and values of 1,000,000 answers of 8,192 tokens"
    with pytest.raises(UserError, match=words):
        open_offer(pair[0], greedy)

    async def ask():
        shelf = Shelf(pair, greedy, opened)
        async with shelf.scoring("teacher"):  # keeps none
            assert list(shelf.weights) == ["teacher"]
        async with shelf.using("teacher"):
            pass

    with pytest.raises(Refusal, match=r"teacher needs .* GB, and other models in use leave less"):
        asyncio.run(ask())


def test_a_model_that_died_is_opened_again_but_not_the_served_one(pair, opened):
    async def ask():
        shelf = Shelf(pair, Opening("torch", context=256), opened)
        async with shelf.using("teacher") as first:
            first.engine.close()
            with pytest.raises(Refusal, match="teacher does not answer any more"):  # others still use it
                async with shelf.using("teacher"):
                    pass
        async with shelf.using("teacher") as second:
            assert (second is first, second.engine.trouble()) == (False, "")
        opened.engine.close()
        with pytest.raises(Refusal, match="student does not answer any more"):
            async with shelf.using("student"):
                pass
        shelf.close()

    asyncio.run(ask())


def test_a_hub_model_counts_its_files(tokenizer, tmp_path, monkeypatch):
    from potstill.edges.models import save_model

    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--ORG--tiny" / "snapshots" / commit
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    save_model(build_model(tokenizer), tokenizer, snapshot, dtype=torch.bfloat16)
    one = Offer("hub", "Hub", "base", f"hf:ORG/tiny@{commit}", Prompts())
    found = open_offer(one, Opening("torch", context=64))
    found.close()
    assert found.file_bytes == (snapshot / "model.safetensors").stat().st_size
    assert found.file_bytes < 0.7 * found.engine.resident_bytes()
