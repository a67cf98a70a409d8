"""A model that cannot be read exactly is told before anything runs, at the field that names it."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_parts import chat_tokenizer, write_rows

from potstill.cli import main
from potstill.data.prompts import Prompts
from potstill.sources.primer import Primer
from potstill.stages.outlook import Outlook, read_rows

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 0}
RECIPE = """
name = "unreadable"
data = { kind = "jsonl", path = "ROWS" }
prompts = { max_tokens = 64, max_prompt_tokens = 40 }

[[stage]]
name = "sft"
kind = "sft"
model = "path:MODEL"

[[stage]]
name = "study"
kind = "evaluate"
study = [{ name = "SFT", model = "stage:sft" }]
"""


def saved(folder: Path, kind: str, **sizes: Any) -> Path:
    import transformers as t

    tokenizer = chat_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = t.AutoConfig.for_model(kind, vocab_size=len(tokenizer), **SIZES, **sizes)
        t.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def call(verb: str, recipe: Path) -> Any:
    return CliRunner().invoke(main, [verb, str(recipe)])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "unreadable.toml"
    path.write_text(RECIPE.replace("ROWS", str(write_rows(tmp_path / "rows.jsonl"))).replace("MODEL", str(tmp_path / "model")))
    return path


@pytest.mark.parametrize("verb", ["check", "run"])
def test_it_is_refused_where_it_is_named(verb: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "model", "rwkv", attention_hidden_size=32)
    told = call(verb, recipe)
    assert told.exit_code == 2, told.output
    assert "1 problem" in told.output
    assert "sft.model" in told.output
    assert "choose another model" in told.output


def test_a_model_without_attention_heads_is_checked_and_planned(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "model", "mamba2", state_size=8, num_heads=8, head_dim=8, n_groups=1)
    for verb in ("check", "plan"):
        told = call(verb, recipe)
        assert told.exit_code == 0, told.output
        assert "choose another model" not in told.output


def test_what_is_no_model_by_its_first_layers_is_not_timed() -> None:
    """Qwen3.5's first layers are recurrent; the cache of such layers alone has no length."""
    import transformers as t

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "linear_num_key_heads": 2}
    linear = {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    config = t.Qwen3_5TextConfig(vocab_size=400, intermediate_size=64, **SIZES | {"num_hidden_layers": 4}, **heads, **linear)
    rows = read_rows(Primer(countries=4), Prompts(), chat_tokenizer(), "train")
    assert Outlook(measure=True).probe(config, rows) is None
