"""The OpenAI engine and the stage that uses it, against llama.cpp's own server."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faulty import KEY
from llamacpp import needs_llamacpp, served
from tiny_parts import chat_tokenizer, tiny_model

from potstill.core.errors import UserError
from potstill.core.types import Turn
from potstill.data.rollout import Asked, Sampling
from potstill.edges.models import load_stored, load_tokenizer
from potstill.exporters.gguf import Gguf
from potstill.recipe.parse import parse_recipe
from potstill.rollouts.api import OpenAI, TooLong
from potstill.rollouts.local import Local
from potstill.run.runner import run_recipe

pytestmark = needs_llamacpp
REAL = os.environ.get("POTSTILL_REAL_MODELS", "")
GREEDY = Sampling(temperature=0, max_new_tokens=6)


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    tokenizer = chat_tokenizer(320)
    return tiny_model("qwen2", len(tokenizer), eos=tokenizer.eos_token_id, std=0.3), tokenizer


@pytest.fixture(scope="module")
def url(parts: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    (file,) = Gguf(types=("f32",)).write(*parts, {}, tmp_path_factory.mktemp("gguf"))
    with served(file, positions=256) as found:
        yield found


def turns(text: str) -> Asked:
    return Asked(turns=(Turn("user", text),))


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    written = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(written, add_special_tokens=False).input_ids


def test_greedy_answers_are_those_of_transformers(parts: tuple[Any, Any], url: str) -> None:
    model, tokenizer = parts
    texts = ["Say amber and kiln.", "Say heads.", "¿Qué es?"]
    found = OpenAI(url=url, retries=0, model="tiny")([turns(text) for text in texts], 1, GREEDY, 0)
    for text, one in zip(texts, found, strict=True):
        ids = prompt_ids(tokenizer, text)
        with torch.inference_mode():
            all_1T = model.generate(
                torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=tokenizer.eos_token_id
            )
        new = all_1T[0, len(ids) :].tolist()
        text_of_both = tokenizer.decode(new, skip_special_tokens=True).strip().rstrip("\ufffd")
        assert one.text == text_of_both  # llama.cpp holds back half a character at the end
        assert one.finished is (tokenizer.eos_token_id in new)
        assert one.usage is not None
        assert one.usage.prompt_tokens == len(ids)
        assert one.usage.answer_tokens in (len(new), len(new) - 1)  # whether the end counts is the server's affair


def test_log_probabilities_are_those_of_transformers(parts: tuple[Any, Any], url: str) -> None:
    model, tokenizer = parts
    ids = prompt_ids(tokenizer, "Say amber.")
    engine = OpenAI(url=url, retries=0, model="tiny", logprobs=True)
    found = engine([Asked(ids=tuple(ids))], 8, Sampling(max_new_tokens=1), 0)
    with torch.inference_mode():
        logp_V = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).numpy()
    told = [one for one in found if one.logp_N.size]
    assert told
    for one in told:
        near = np.flatnonzero(np.abs(logp_V - one.logp_N[0]) < 1e-3)
        assert any(tokenizer.decode([token]).strip() == one.text for token in near)


def test_greedy_log_probabilities_are_the_models_own(parts: tuple[Any, Any], url: str) -> None:
    model, tokenizer = parts
    ids = prompt_ids(tokenizer, "Say kiln.")
    (one,) = OpenAI(url=url, retries=0, model="tiny", logprobs=True)([Asked(ids=tuple(ids))], 1, GREEDY, 0)
    (here,) = Local(model, tokenizer, [])([Asked(ids=tuple(ids))], 1, GREEDY, 0)
    np.testing.assert_allclose(one.logp_N, here.logp_N[: one.logp_N.size], atol=1e-3)
    assert one.logp_N.size in (len(here.ids), len(here.ids) - here.finished)


def test_samples_follow_from_the_seed(url: str) -> None:
    engine, prompts = OpenAI(url=url, retries=0, model="tiny"), [turns("Say amber."), turns("Say amber.")]
    first, again, other = (engine(prompts, 2, Sampling(max_new_tokens=12), seed) for seed in (1, 1, 2))
    assert [one.text for one in first] == [one.text for one in again]
    assert len({one.text for one in first}) == 4
    assert not {one.text for one in first} & {one.text for one in other}
    one_word = engine(prompts, 1, Sampling(top_k=1, max_new_tokens=6), 1)
    assert [one.text for one in one_word] == [one.text for one in engine(prompts, 1, GREEDY, 0)]


def test_a_prompt_beyond_its_context_is_told(url: str) -> None:
    with pytest.raises(TooLong, match="too long for 'tiny'"):
        OpenAI(url=url, retries=0, model="tiny")([turns("Say amber. " * 200)], 1, GREEDY, 0)


def test_an_address_without_an_api_is_told(url: str) -> None:
    with pytest.raises(UserError, match="no such address"):
        OpenAI(url=f"{url}/nothing", model="tiny")([turns("x")], 1, GREEDY, 0)


@pytest.mark.real
@pytest.mark.skipif(not Path(REAL, "smollm2").is_dir() or not REAL, reason="set POTSTILL_REAL_MODELS to a folder with smollm2")
def test_smollm2_writes_rows_behind_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    asked = {"What is the capital of Peru?": "Lima", "What is the capital of France?": "Paris", "What is 2 + 2?": "4"}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": question}) + "\n" for question in asked))
    where = f"path:{REAL}/smollm2"
    (file,) = Gguf(types=("f16",)).write(load_stored(where), load_tokenizer(where), {}, tmp_path)
    data = {"kind": "jsonl", "path": str(rows), "response": "", "language": "en", "splits": {"validation": 0, "test": 0}}
    sampling = {"temperature": 0, "max_new_tokens": 48}
    with served(file, positions=512) as url:
        stages = [
            {"name": "api", "kind": "generate", "api": {"url": url, "model": "smollm2", "key_env": "TEACHER_KEY"}},
            {"name": "here", "kind": "generate", "model": where},
        ]
        table = {"name": "w", "data": data, "stage": [stage | {"sampling": sampling} for stage in stages]}
        made = run_recipe(parse_recipe(table), tmp_path / "run")
    found = {}
    for name, artifact in made.items():
        lines = [json.loads(line) for line in (artifact.folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
        found[name] = {line["instruction"]: line["response"] for line in lines}
        assert artifact.summary["answers"] == 3
    for question, word in asked.items():
        assert word in found["api"][question]
        assert word in found["here"][question]
    counts = [(artifact.summary["prompt_tokens"], artifact.summary["uncounted"]) for artifact in made.values()]
    assert counts[0] == counts[1]  # the same template on both sides, token for token
