"""SentencePiece-type tokenizers: llama.cpp's scores give the ids that the tokenizer's merges give, or the export is refused."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llamacpp import ask, needs_llamacpp
from strings import TEXTS, random_texts
from tiny_export import CORPUS, TEMPLATE, sentencepiece, tiny_model
from tokenizers import AddedToken

from potstill.core.errors import UserError
from potstill.edges.models import load_tokenizer
from potstill.exporters._sentencepiece import last_pair
from potstill.exporters._vocabulary import vocabulary_keys, vocabulary_problems
from potstill.exporters.gguf import Gguf

COMPETING = random_texts(150, "ban d,:a-=") + random_texts(50, "".join(sorted(set("".join(CORPUS)))))


def rows_of(tokenizer: Any) -> int:
    return len(tokenizer) + 5


def problems_of(tokenizer: Any) -> list[str]:
    return vocabulary_problems(tokenizer, rows_of(tokenizer))


def same_ids(tokenizer: Any, folder: Path, texts: list[str]) -> bool:
    """Whether llama.cpp gives the tokenizer's ids for every text; written whatever the exporter thinks of it."""
    model = tiny_model("mistral", vocab_size=rows_of(tokenizer))
    (file,) = Gguf(types=("f32",)).write_files(model, tokenizer, {}, folder, "student")
    return ask(file, texts=texts)["ids"] == [tokenizer(text).input_ids for text in texts]


ACCEPTED: dict[str, Callable[[], Any]] = {
    "Gemma's": sentencepiece,
    "Metaspace, never": lambda: sentencepiece("never"),
    "Llama 2's": lambda: sentencepiece("llama"),
    "converted": lambda: sentencepiece("converted"),
    "one merge a token": lambda: sentencepiece(whole=False),
    "one merge a token, Llama 2's": lambda: sentencepiece("llama", whole=False),
}


@needs_llamacpp
@pytest.mark.parametrize("kind", ACCEPTED)
def test_token_ids_are_the_tokenizers_own(kind: str, tmp_path: Path) -> None:
    tokenizer = ACCEPTED[kind]()
    assert problems_of(tokenizer) == []
    assert same_ids(tokenizer, tmp_path, TEXTS + COMPETING)


@needs_llamacpp
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_merges_of_any_order_give_the_same_ids_or_are_refused(seed: int, whole: bool, tmp_path: Path) -> None:
    """Ranks of one token lie apart, and tokens come before those that they are made of."""
    tokenizer = sentencepiece(whole=whole, order=random.Random(seed).shuffle)
    assert ["llama.cpp would merge" in problem for problem in problems_of(tokenizer)] == ([] if whole else [True])
    tokens = [token.replace("▁", " ") for token in tokenizer.get_vocab()]
    assert same_ids(tokenizer, tmp_path, TEXTS + COMPETING + tokens) is whole


@needs_llamacpp
@pytest.mark.parametrize("family, blanks", [("gemma3", "gemma"), ("mistral", "llama")])
def test_a_family_with_its_own_kind_of_tokenizer(family: str, blanks: str, tmp_path: Path) -> None:
    """Prompt template, ids of the rendered prompt, and what the model says next."""
    tokenizer = sentencepiece(blanks)
    model = tiny_model(family, vocab_size=rows_of(tokenizer))
    (file,) = Gguf(types=("f32",)).write(model, tokenizer, {}, tmp_path)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "no, banana  bandana"}], tokenize=False)
    ids = tokenizer(text).input_ids
    answer = ask(file, [ids[:6], ids], [text])
    assert answer["props"]["chat_template"] == TEMPLATE
    assert answer["ids"] == [ids]
    with torch.no_grad():
        logp_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for length, found in zip((6, len(ids)), answer["logp"], strict=True):
        assert len(found) == rows_of(tokenizer)
        assert max(abs(float(logp_TV[length - 1, id]) - value) for id, value in found.items()) < 1e-3


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a blank before the text": (lambda: sentencepiece("first"), "how this tokenizer prepares text (Metaspace first)"),
    "a blank before what has none": (lambda: sentencepiece("always"), "how this tokenizer prepares text (Metaspace always)"),
    "a token without merges": (
        lambda: sentencepiece(extra=("=d",)),
        "llama.cpp would merge '=' and 'd', because '=d' is a token",
    ),
}


@needs_llamacpp
@pytest.mark.parametrize("case", REFUSED)
def test_what_llamacpp_tokenises_otherwise_is_refused(case: str, tmp_path: Path) -> None:
    make, words = REFUSED[case]
    (problem,) = problems_of(make())
    assert words in problem
    assert "export 'safetensors' instead" in problem
    assert not same_ids(make(), tmp_path, [*TEXTS, "a =d"]), "the refusal has a reason"


DIFFERS = {
    "first": ("<s>a", ["<s>", "<s>", "a"], ["<s>", "<s>", "▁", "a"]),
    "always": (" a", ["<s>", "▁", "a"], ["<s>", "▁▁", "a"]),
}


@needs_llamacpp
@pytest.mark.parametrize("scheme", DIFFERS)
def test_llamacpp_puts_a_blank_where_metaspace_puts_none(scheme: str, tmp_path: Path) -> None:
    """With either value of the file's add_space_prefix: without it there is no blank before "a" either."""
    text, own, theirs = DIFFERS[scheme]
    tokenizer, llama = sentencepiece(scheme), sentencepiece("llama")
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == own
    (file,) = Gguf(types=("f32",)).write(tiny_model("mistral", vocab_size=rows_of(llama)), llama, {}, tmp_path)
    assert tokenizer.convert_ids_to_tokens(ask(file, texts=[text])["ids"][0]) == theirs
    assert not same_ids(tokenizer, tmp_path, ["a"])


def as_the_hub_has_it(folder: Path, named: str, **settings: Any) -> Any:
    """Llama 2's own tokenizer.json, loaded as the class that its config names."""
    tokenizer = sentencepiece("llama")
    named = {"tokenizer_class": named, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **settings}
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return load_tokenizer(f"path:{folder}")


@pytest.mark.parametrize("legacy", [True, False])
def test_a_llama_2_tokenizer_that_transformers_rebuilt_is_refused_with_the_way_out(legacy: bool, tmp_path: Path) -> None:
    tokenizer = as_the_hub_has_it(tmp_path, "LlamaTokenizer", legacy=legacy)
    (problem,) = problems_of(tokenizer)
    assert f"how this tokenizer prepares text (Metaspace {'always' if legacy else 'first'})" in problem
    assert "export 'safetensors' instead, or write tokenizer_class = 'PreTrainedTokenizerFast' in" in problem


@needs_llamacpp
def test_the_way_out_for_a_llama_2_tokenizer(tmp_path: Path) -> None:
    tokenizer = as_the_hub_has_it(tmp_path, "PreTrainedTokenizerFast")
    assert problems_of(tokenizer) == []
    assert same_ids(tokenizer, tmp_path, TEXTS + COMPETING)


ADDED: dict[str, tuple[str, AddedToken, bool]] = {
    "raw": ("gemma", AddedToken("<x>", normalized=False), True),
    "raw, of two characters that nothing merges": ("gemma", AddedToken("=>", normalized=False), True),
    "raw, with a blank": ("gemma", AddedToken("a b", normalized=False), True),
    "raw, Llama 2's": ("llama", AddedToken("<x>", normalized=False), True),
    "normalised": ("gemma", AddedToken("<x>", normalized=True), True),
    "normalised, nothing to normalise": ("never", AddedToken("a b", normalized=True), True),
    "normalised, with a blank": ("gemma", AddedToken("a b", normalized=True), False),
    "normalised, Llama 2's": ("llama", AddedToken("<x>", normalized=True), False),
    "normalised, converted": ("converted", AddedToken("<x>", normalized=True), False),
}


@needs_llamacpp
@pytest.mark.parametrize("case", ADDED)
def test_added_tokens_are_found_where_the_tokenizer_finds_them_or_refused(case: str, tmp_path: Path) -> None:
    blanks, token, fine = ADDED[case]
    tokenizer = sentencepiece(blanks)
    tokenizer.add_tokens([token])
    problems = problems_of(tokenizer)
    assert ["is looked for after blanks are written as ▁" in problem for problem in problems] == ([] if fine else [True])
    texts = ["a<x>b", "a <x> b", "<x>", " <x>", "a b", "a▁b", "x a b y", "<s>a b<s> <x>", "a=>b", " => ==>"]
    assert same_ids(tokenizer, tmp_path, texts) is fine


@needs_llamacpp
@pytest.mark.parametrize("blanks", ["gemma", "never"])
def test_added_runs_of_blanks_are_merged_like_text_and_spelt_as_blanks(blanks: str, tmp_path: Path) -> None:
    tokenizer = sentencepiece(blanks)
    runs = [token for token in tokenizer.get_vocab() if len(token) > 1 and set(token) == {"▁"}]
    assert runs, "the corpus has runs of blanks"
    tokenizer.add_tokens([AddedToken(run, normalized=False) for run in runs])
    assert problems_of(tokenizer) == []
    assert same_ids(tokenizer, tmp_path, [text for text in TEXTS + COMPETING if "▁" not in text])
    ids = tokenizer.convert_tokens_to_ids(["a", max(runs, key=len), "b"])
    assert ask(tmp_path / "model-f32.gguf", spelt=[ids])["texts"] == [f"a{' ' * len(max(runs, key=len))}b"]


def test_a_tokenizer_without_all_bytes_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({"<0x00>": 0, "a": 1, "</s>": 2}, [], byte_fallback=True))
    problems = problems_of(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    assert (
        sum("needs a token for every byte, never merged, and the tokenizer lacks 255" in problem for problem in problems) == 1
    )


def test_other_kinds_of_tokenizers_are_refused_by_name() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, True))
    (problem,) = problems_of(PreTrainedTokenizerFast(tokenizer_object=unigram, unk_token="<unk>"))
    assert problem == "the gguf exporter knows BPE tokenizers, not Unigram; export 'safetensors' instead"


def test_settings_of_bpe_that_llamacpp_lacks_are_refused(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.model.ignore_merges = True
    (problem,) = problems_of(tokenizer)
    assert "cannot express ignore_merges" in problem
    with pytest.raises(UserError, match="cannot express ignore_merges"):
        Gguf().write(tiny_model("mistral", vocab_size=rows_of(tokenizer)), tokenizer, {}, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("blanks, before", [("gemma", False), ("llama", True), ("converted", True)])
def test_every_key_is_there(blanks: str, before: bool) -> None:
    tokenizer = sentencepiece(blanks)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    keys = vocabulary_keys(tokenizer, rows_of(tokenizer))
    tokens, types, scores = (keys.pop(f"tokenizer.ggml.{part}") for part in ("tokens", "token_type", "scores"))
    assert len(tokens) == len(types) == len(scores) == rows_of(tokenizer)
    kinds = dict(zip(tokens, types, strict=True))
    assert [kinds[token] for token in ("a", "<s>", "<tool>", tokens[-1], "<0x0A>")] == [1, 3, 4, 5, 6]
    assert keys == {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": before,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }


def test_byte_level_tokenizers_keep_their_merges_and_get_no_scores(tokenizer: Any) -> None:
    keys = vocabulary_keys(tokenizer, 320)
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert "tokenizer.ggml.scores" not in keys
    assert "tokenizer.ggml.unknown_token_id" not in keys


def test_the_last_pair_of_a_text_by_hand() -> None:
    ranks = {("b", "c"): 0, ("a", "bc"): 1, ("a", "b"): 2, ("a", "a"): 3, ("aa", "aa"): 4}
    assert last_pair("abc", ranks) == ("a", "bc")
    assert last_pair("aaaa", ranks) == ("aa", "aa")
    assert last_pair("xy", ranks) == ("x", "y")
    assert last_pair("axb", ranks) is None
    assert last_pair("a", ranks) is None
    assert last_pair("", ranks) is None
