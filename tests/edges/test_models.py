"""Models on disk: what is whole loads, what is not says why, and nothing of theirs is ever run."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from family import build_model, build_tokenizer
from safetensors.torch import load_file, save_file

from potstill.core.errors import UserError
from potstill.data.batches import pack
from potstill.divergences.forward_kl import ForwardKL
from potstill.edges.models import (
    bytes_of,
    check_known,
    check_vocabulary,
    config_of,
    content_id,
    load_model,
    load_tokenizer,
    own_tokens,
    save_model,
    shared_vocabulary,
    size_of,
    weight_files,
)
from potstill.losses.distillation import Distillation
from potstill.losses.scoring import token_sums
from potstill.metrics.kl_to_teacher import KLToTeacher
from potstill.metrics.nll import NLL
from potstill.teachers.signals import Live


@pytest.fixture
def folder(family, tmp_path) -> Path:
    """A copy of the tiny student, to be damaged."""
    return Path(shutil.copytree(family["student"], tmp_path / "model"))


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        act()
    return str(caught.value)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_whole_folder_loads(folder, tokenizer):
    model = load_model(f"path:{folder}")
    assert not model.training
    assert model.dtype == torch.float32
    assert load_tokenizer(f"path:{folder}").get_vocab() == tokenizer.get_vocab()


# What is not there


def test_no_such_folder(folder):
    assert refusal(lambda: load_model(f"path:{folder}l")) == f"path:{folder}l: no such folder; did you mean 'model'?"


def test_the_home_of_nobody():
    assert refusal(lambda: load_model("path:~nobody-at-all/model")) == "path:~nobody-at-all/model: no such folder"


def test_no_config(folder):
    (folder / "config.json").unlink()
    told = f"path:{folder}: holds no config.json, so it is not a model that transformers saved"
    assert refusal(lambda: load_model(f"path:{folder}")) == told


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    told = f"path:{folder}: holds no tokenizer (tokenizer.json); copy it from the model it was trained from"
    assert refusal(lambda: load_tokenizer(f"path:{folder}")) == told


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert refusal(lambda: load_model(f"path:{folder}")) == f"path:{folder}: holds no model.safetensors"


def test_pickled_weights_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refusal(lambda: load_model(f"path:{folder}")) == (
        f"path:{folder}: has pickled weights only, and unpickling can run code; save it once with save_pretrained(…) in an "
        "environment you trust, which writes safetensors"
    )


# What is damaged


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda whole: whole[:-100], "truncated, {size:,} of {whole:,} bytes; copy or download it again"),
        (lambda whole: whole[:200], "truncated in its header (200 bytes); copy or download it again"),
        (lambda whole: whole[:5], "truncated in its header (5 bytes); copy or download it again"),
        (lambda whole: b"", "truncated in its header (0 bytes); copy or download it again"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\n", "truncated in its header (43 bytes); {again}"),
        (lambda whole: whole[:8] + b"x" * (len(whole) - 8), "not a safetensors file (its header is no JSON); {again}"),
    ],
    ids=["body", "header", "length", "empty", "pointer", "garbage"],
)
def test_damaged_weights(folder, damage, told):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    again = "copy or download it again"
    expected = told.format(size=file.stat().st_size, whole=len(whole), again=again)
    assert refusal(lambda: load_model(f"path:{folder}")) == f"{file}: {expected}"


def test_a_missing_shard(folder):
    load_model(f"path:{folder}").save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    shards = weight_files(folder)
    assert len(shards) > 2
    assert sum(p.numel() for p in load_model(f"path:{folder}").parameters()) > 0
    shards[1].unlink()
    told = f"{shards[1].name} is missing (1 of {len(shards)} weight files); copy or download it again"
    assert refusal(lambda: load_model(f"path:{folder}")) == f"path:{folder}: {told}"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "ÿ"])
def test_a_damaged_index(folder, text):
    index = folder / "model.safetensors.index.json"
    index.write_text(text, encoding="latin-1")
    told = f"{index}: not an index of weight files; copy or download it again"
    assert refusal(lambda: load_model(f"path:{folder}")) == told


def test_a_weight_is_missing(folder):
    edit_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    told = f"path:{folder}: 1 weight is missing: 'model.norm.weight'; the folder is not complete"
    assert refusal(lambda: load_model(f"path:{folder}")) == told


def test_a_weight_of_another_shape(folder):
    edit_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(7)}))
    assert refusal(lambda: load_model(f"path:{folder}")) == (
        f"path:{folder}: the weights do not fit config.json: 'model.norm.weight' is (7,), config.json asks for (32,); "
        "take both from one model"
    )


def test_config_is_no_json(folder):
    (folder / "config.json").write_text("{")
    told = f"path:{folder}: config.json cannot be read (It looks like the config file at '{folder}/config.json' "
    assert refusal(lambda: load_model(f"path:{folder}")).startswith(told)


def test_a_type_that_is_not_supported(folder):
    edit_json(folder / "config.json", model_type="t5")
    told = f"path:{folder}: a model of type 't5' is no causal language model; choose one that is"
    assert refusal(lambda: load_model(f"path:{folder}")) == told


# The hub, without a network


@pytest.mark.parametrize("act", [load_model, load_tokenizer, content_id, config_of])
def test_the_hub_out_of_reach(act):
    told = refusal(lambda: act("hf:Qwen/Qwen2-0.5B"))
    assert told.startswith("hf:Qwen/Qwen2-0.5B: cannot be loaded from the hub (")
    assert told.endswith(
        "); without a network, download it elsewhere with 'hf download Qwen/Qwen2-0.5B --local-dir DIR' and write 'path:DIR'"
    )


def test_a_full_commit_needs_no_hub():
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert content_id(f"hf:Qwen/Qwen2-0.5B@{commit}") == f"Qwen/Qwen2-0.5B@{commit}"


# Nothing of a model's is ever run


@pytest.fixture
def trap(folder) -> Path:
    """A model folder that brings Python code, which would leave a mark."""
    mark = folder.parent / "it-ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass C: pass\nclass M: pass\nclass T: pass\n")
    edit_json(folder / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})
    return mark


def test_code_beside_a_known_type_is_ignored(folder, trap):
    assert load_model(f"path:{folder}").config.model_type == "qwen2"
    load_tokenizer(f"path:{folder}")
    assert not trap.exists()


def test_a_type_that_needs_code_is_refused(folder, trap):
    edit_json(folder / "config.json", model_type="evil")
    told = f"path:{folder}: needs its own Python code, which potstill never runs; choose another model"
    assert refusal(lambda: load_model(f"path:{folder}")) == told
    assert not trap.exists()


# Sizes


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("Qwen/Qwen2-0.5B", 494_032_768),
        ("Qwen/Qwen2-1.5B", 1_543_714_304),
        ("Qwen/Qwen2-7B", 7_615_616_512),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-3B", 3_085_938_688),
        ("openai-community/gpt2", 124_439_808),
        ("openai-community/gpt2-xl", 1_557_611_200),
    ],
)
def test_parameters_as_published(name, parameters):
    assert size_of(config_of(f"hf:{name}", offline_shape=True)).parameters == parameters


def test_size_of_counts_what_is_loaded(folder):
    model = load_model(f"path:{folder}")
    assert size_of(model.config).parameters == sum(p.numel() for p in model.parameters())


def test_an_untied_head_counts(tokenizer):
    model = build_model(tokenizer)
    config = model.config
    config.tie_word_embeddings = False
    size = size_of(config)
    assert size.head == len(tokenizer) * 32
    assert size.parameters == model.num_parameters() + size.head


def test_bytes_are_those_on_disk(folder):
    assert bytes_of(folder) == (folder / "model.safetensors").stat().st_size


def test_bytes_of_shards_add_up(folder):
    load_model(f"path:{folder}").save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    assert bytes_of(folder) == sum(file.stat().st_size for file in folder.glob("model-*.safetensors"))


# Identity


def test_identity_follows_the_content_not_the_place(folder):
    before = content_id(f"path:{folder}")
    moved = folder.rename(folder.with_name("moved"))
    assert content_id(f"path:{moved}") == before
    edit_weights(moved, lambda weights: weights["model.norm.weight"].add_(1e-3))
    assert content_id(f"path:{moved}") != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_identity_counts_what_shapes_the_tokens(folder, name):
    before = content_id(f"path:{folder}")
    (folder / name).write_text((folder / name).read_text() + " \n")
    assert content_id(f"path:{folder}") != before


def test_remembered_hashes_see_a_change(folder):
    remembered: dict[str, object] = {}
    before = content_id(f"path:{folder}", remembered)
    assert content_id(f"path:{folder}", remembered) == before
    edit_weights(folder, lambda weights: weights["model.norm.weight"].add_(1e-3))
    assert content_id(f"path:{folder}", remembered) != before


# Two models of one tokenizer


def test_different_tokenizers_are_refused(tokenizer):
    other = build_tokenizer(["entirely other words, of another kind altogether"] * 3, 300)
    theirs, ours = tokenizer.get_vocab(), other.get_vocab()
    where = min(i for i in range(400) if tokenizer.convert_ids_to_tokens(i) != other.convert_ids_to_tokens(i))
    assert refusal(lambda: shared_vocabulary(tokenizer, other, "teacher", "student")) == (
        f"student and teacher have different tokenizers ({len(ours)} and {len(theirs)} tokens; id {where} is "
        f"{other.convert_ids_to_tokens(where)!r} in one, {tokenizer.convert_ids_to_tokens(where)!r} in the other); "
        "white-box distillation compares them token by token: choose two models of one family"
    )


def with_more(tokenizer, *tokens):
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(list(tokens))
    return grown


def test_tokens_at_the_end_of_one_tokenizer_are_left_out_and_said(tokenizer):
    grown, size = with_more(tokenizer, "<think>", "</think>"), len(tokenizer)
    assert shared_vocabulary(tokenizer, grown) == shared_vocabulary(grown, tokenizer) == size
    assert own_tokens(grown, tokenizer, "T", "S") == own_tokens(tokenizer, grown, "S", "T")
    assert own_tokens(grown, tokenizer, "T", "S") == (
        f"T has 2 tokens of its own (ids {size} to {size + 1}): only the first {size} are compared"
    )
    assert own_tokens(tokenizer, copy.deepcopy(tokenizer), "T", "S") == ""
    check_known(size - 1, size, grown, "kd")
    assert refusal(lambda: check_known(max(grown.encode("a <think> b")), size, grown, "kd")) == (
        f"kd: the rows hold '<think>' (id {size}), which one of the two tokenizers does not have; "
        "choose two models with one tokenizer, or a prompts.format without that token"
    )


def test_different_tokens_at_the_end_are_refused(tokenizer):
    one, other = with_more(tokenizer, "<a>"), with_more(tokenizer, "<b>", "<c>")
    assert f"id {len(tokenizer)} is '<b>' in one, '<a>' in the other" in refusal(lambda: shared_vocabulary(one, other))


def test_a_tokenizer_that_outgrew_its_model_is_refused(tokenizer):
    model = build_model(tokenizer, vocab=len(tokenizer) - 2)
    check_vocabulary(build_model(tokenizer, vocab=len(tokenizer) + 2), tokenizer, "path:model")
    assert refusal(lambda: check_vocabulary(model, tokenizer, "path:model")) == (
        f"path:model: the tokenizer has {len(tokenizer)} tokens and the model only {len(tokenizer) - 2} embeddings; "
        "call model.resize_token_embeddings(len(tokenizer)) and save it again"
    )


@pytest.fixture(scope="module")
def padded(tmp_path_factory, tokenizer):
    """A student and a teacher of one tokenizer, their embeddings padded to different sizes, as Qwen2.5-0.5B and -7B are."""
    root = tmp_path_factory.mktemp("padded")
    for name, seed, rows in (("student", 1, 8), ("teacher", 2, 136)):
        model = build_model(tokenizer, 32, seed=seed, vocab=len(tokenizer) + rows)
        if name == "teacher":  # what was never trained may hold anything
            model.lm_head.weight.data[len(tokenizer) :] = 100.0
        save_model(model, tokenizer, root / name)
    return root


def one_batch(tokenizer):
    pairs = [(tokenizer.encode("What is the capital of France?"), tokenizer.encode("The capital of France is Paris."))]
    return pack([(np.array(prompt), np.array(response)) for prompt, response in pairs]), pairs


def test_the_divergence_gives_padded_rows_no_gradient(padded, tokenizer):
    vocab = shared_vocabulary(load_tokenizer(f"path:{padded}/teacher"), load_tokenizer(f"path:{padded}/student"))
    assert vocab == len(tokenizer)
    teacher, student = load_model(f"path:{padded}/teacher"), load_model(f"path:{padded}/student")
    assert teacher.config.vocab_size != student.config.vocab_size
    loss = Distillation(Live(teacher), ForwardKL(), 1.0, 1.0, vocab)(student, one_batch(tokenizer)[0])
    loss.total.backward()
    head = student.get_output_embeddings().weight
    assert torch.isfinite(loss.total)
    assert head.grad[:vocab].abs().sum() > 0
    assert torch.equal(head.grad[vocab:], torch.zeros_like(head.grad[vocab:]))


def test_padded_rows_hold_no_mass(padded, tokenizer):
    """The teacher's huge padded logits would swallow its distribution, were they not cut off."""
    vocab = len(tokenizer)
    teacher, student = load_model(f"path:{padded}/teacher"), load_model(f"path:{padded}/student")
    batch, pairs = one_batch(tokenizer)
    with torch.no_grad():
        loss = Distillation(Live(teacher), ForwardKL(), 1.0, 1.0, vocab)(student, batch)
        p, q = (
            model(input_ids=batch.ids_T[None]).logits[0, batch.place_N, :vocab].double().log_softmax(-1)
            for model in (teacher, student)
        )
    expected = (p.exp() * (p - q)).sum()
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-5, atol=1e-5)
    sums = token_sums(student, teacher, pairs, vocab, {"nll": NLL(), "kl_to_teacher": KLToTeacher()})
    assert sums["kl_to_teacher"][0] == pytest.approx(float(expected), rel=1e-4)
    assert sums["nll"][0] == pytest.approx(float(-q.gather(1, batch.target_N[:, None]).sum()), rel=1e-4)
