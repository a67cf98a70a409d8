"""What holds for every way of cutting a student out of a model; a new kind inherits these, and adds its lines to CUTS."""

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_parts import tiny_model
from torch import Tensor

from potstill.core.errors import UserError
from potstill.edges.models import load_model, size_of
from potstill.edges.packed import final_hidden
from potstill.inits import Init
from potstill.inits.layers import Layers
from potstill.inits.width import Width

FAMILIES = ("qwen2", "llama", "gpt2", "qwen3", "mistral", "smollm3")
VOCAB = 61
# kind -> fields that cut something from two layers of 32 channels, 64 (GPT-2: 128) inner units, 4 heads of 8
CUTS: dict[str, list[dict[str, Any]]] = {
    "layers": [{"keep": [0]}, {"keep": [1]}, {"count": 1}, {"count": 1, "by": "influence"}],
    "width": [
        {"hidden_size": 16, "heads": 2},
        {"intermediate_size": 24},
        {"hidden_size": 16, "heads": 2, "by": "magnitude"},
        {"intermediate_size": 24, "by": "magnitude"},
    ],
}
IDS_BT = torch.randint(0, VOCAB, (2, 17), generator=torch.Generator().manual_seed(0))

Cut = Callable[[Any], Any]


def model_of(family: str, **more: Any) -> Any:
    return tiny_model(family, VOCAB, **more)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS_BT).logits


def nll(model: Any, rows: int) -> float:
    """Nats a token of the first rows, in two passes, as calibration is."""
    with torch.no_grad():
        halves = [model(half_BT, labels=half_BT).loss for half_BT in IDS_BT.split(1)[:rows]]
    return float(sum(halves)) / len(halves)


def size(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def finite_and_of_the_vocabulary(cut: Cut, model: Any) -> bool:
    found = logits(cut(model))
    return found.shape == (*IDS_BT.shape, VOCAB) and bool(found.isfinite().all())


def has_fewer_parameters(cut: Cut, model: Any) -> bool:
    return size(cut(model)) < size(model)


def leaves_the_model_alone(cut: Cut, model: Any) -> bool:
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    made = cut(model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1.0)  # as training would
    same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return same and model.config.to_dict() == config


def keeps_the_head_tied(cut: Cut, model: Any) -> bool:
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    made = cut(model)
    return (made.lm_head.weight is made.get_input_embeddings().weight) == tied


def is_what_its_config_says(cut: Cut, model: Any) -> bool:
    made = cut(model)
    return size_of(made.config).parameters == size(made)


def gives_the_same_again(cut: Cut, model: Any) -> bool:
    return torch.equal(logits(cut(model)), logits(cut(model)))


def decodes_with_a_cache_as_without(cut: Cut, model: Any) -> bool:
    made = cut(model)
    asked = {"attention_mask": torch.ones_like(IDS_BT), "pad_token_id": 0, "do_sample": False}
    length = {"min_new_tokens": 6, "max_new_tokens": 6}
    return torch.equal(*(made.generate(IDS_BT, **asked, **length, use_cache=cached) for cached in (True, False)))


def is_attended_row_by_row_as_any_model(cut: Cut, model: Any) -> bool:
    made = cut(model)
    with torch.no_grad():
        packed = final_hidden(made, IDS_BT.flatten(), torch.arange(17).repeat(2), [17, 17])
        padded = made.base_model(IDS_BT).last_hidden_state.flatten(0, 1)
    return torch.allclose(packed, padded, atol=1e-5)


LAWS: list[Callable[[Cut, Any], bool]] = [
    finite_and_of_the_vocabulary,
    has_fewer_parameters,
    leaves_the_model_alone,
    keeps_the_head_tied,
    is_what_its_config_says,
    gives_the_same_again,
    decodes_with_a_cache_as_without,
    is_attended_row_by_row_as_any_model,
]


def shares_its_tensors(model: Any) -> Any:
    made = Layers(keep=(0,))(model)
    made.get_input_embeddings().weight = model.get_input_embeddings().weight
    return made


def unties(model: Any) -> Any:
    made = Layers(keep=(0,))(model)
    made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.detach().clone())
    return made


def keeps_the_old_config(model: Any) -> Any:
    made = Layers(keep=(0,))(model)
    made.config = copy.deepcopy(model.config)
    return made


def keeps_the_old_numbers(model: Any) -> Any:
    made = Layers(keep=(1,))(model)
    made.base_model.layers[0].self_attn.layer_idx = 1  # the cache then files its keys under a layer that is not there
    return made


def poisoned(model: Any) -> Any:
    made = Layers(keep=(0,))(model)
    made.base_model.norm.weight.data[0] = torch.nan
    return made


def restarted(model: Any) -> Any:
    made = Layers(keep=(0,))(model)
    torch.nn.init.normal_(made.base_model.layers[0].mlp.up_proj.weight)
    return made


def bidirectional(model: Any) -> Any:
    made = Layers(keep=(0,))(model)
    attend = made.base_model.layers[0].self_attn.forward
    made.base_model.layers[0].self_attn.forward = lambda hidden_states, **more: attend(hidden_states.flip(0), **more)
    return made


BROKEN: dict[str, Cut] = {
    "finite_and_of_the_vocabulary": poisoned,
    "has_fewer_parameters": copy.deepcopy,
    "leaves_the_model_alone": shares_its_tensors,
    "keeps_the_head_tied": unties,
    "is_what_its_config_says": keeps_the_old_config,
    "gives_the_same_again": restarted,
    "decodes_with_a_cache_as_without": keeps_the_old_numbers,
    "is_attended_row_by_row_as_any_model": bidirectional,
}


def every_cut() -> list[Any]:
    return [
        pytest.param(partial(Init.parse({"kind": kind, **fields}), nll=nll), id=f"{kind}-{i}")
        for kind in sorted(Init.kinds)
        for i, fields in enumerate(CUTS[kind])
    ]


def test_every_kind_is_cut_here() -> None:
    assert set(CUTS) == set(Init.kinds), "add fields of a new kind to CUTS"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("cut", every_cut())
def test_every_init_keeps_the_law(cut: Any, law: Callable[[Cut, Any], bool], family: str, tied: bool) -> None:
    assert law(cut, model_of(family, tie_word_embeddings=tied))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_law_rejects_a_broken_init(law: Callable[[Cut, Any], bool]) -> None:
    with suppress(IndexError):  # no such layer in the cache
        assert not law(BROKEN[law.__name__], model_of("qwen2"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cut", every_cut())
def test_saved_and_loaded_it_is_the_same(cut: Any, family: str, tmp_path: Any) -> None:
    assert_survives_the_disk(cut(model_of(family)), tmp_path)


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3", "mistral", "smollm3"])
@pytest.mark.parametrize("cut", [Width(heads=2), Width(hidden_size=24), Width(hidden_size=12, heads=2)])
def test_a_head_keeps_its_width(cut: Width, family: str, tmp_path: Any) -> None:
    made = cut(model_of(family), nll)
    heads = cut.heads or 4
    assert made.config.head_dim == 8
    assert made.base_model.layers[0].self_attn.q_proj.weight.shape == (8 * heads, cut.hidden_size or 32)
    assert_survives_the_disk(made, tmp_path)


def assert_survives_the_disk(made: Any, folder: Any) -> None:
    made.save_pretrained(str(folder))
    again = load_model(f"path:{folder}").cpu()
    assert torch.equal(logits(again), logits(made))
    assert type(again) is type(made)
    assert {k: v for k, v in again.config.to_dict().items() if k[0] != "_"} == {
        k: v for k, v in made.config.to_dict().items() if k[0] != "_"
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_are_the_model(family: str) -> None:
    model = model_of(family, num_hidden_layers=3)
    assert torch.equal(logits(Layers(keep=(0, 1, 2))(model)), logits(model))


@pytest.mark.parametrize(("family", "inner"), [(family, 128 if family == "gpt2" else 64) for family in FAMILIES])
def test_the_models_own_width_is_the_model(family: str, inner: int) -> None:
    model = model_of(family)
    assert torch.equal(logits(Width(hidden_size=32, intermediate_size=inner, heads=4)(model, nll)), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [(0,), (2,), (0, 2)])
def test_layers_are_those_of_a_model_built_by_hand(family: str, keep: tuple[int, ...]) -> None:
    model = model_of(family, num_hidden_layers=3)
    by_hand = model_of(family, num_hidden_layers=len(keep), seed=5)
    blocks = "h" if family == "gpt2" else "layers"
    names = ("wte", "wpe", "ln_f") if family == "gpt2" else ("embed_tokens", "norm")
    for name in names:
        getattr(by_hand.base_model, name).load_state_dict(getattr(model.base_model, name).state_dict())
    for i, layer in enumerate(keep):
        getattr(by_hand.base_model, blocks)[i].load_state_dict(getattr(model.base_model, blocks)[layer].state_dict())
    assert torch.equal(logits(Layers(keep=keep)(model)), logits(by_hand))


def test_a_layer_keeps_its_kind_of_attention() -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model = model_of("qwen2", num_hidden_layers=3, **sliding)
    assert Layers(keep=(0, 2))(model).config.layer_types == ["full_attention", "sliding_attention"]
    assert Layers(keep=(1, 2))(model).base_model.layers[0].self_attn.sliding_window == 4


@pytest.mark.parametrize("by", ["activation", "magnitude"])
@pytest.mark.parametrize("family", FAMILIES)
def test_width_drops_what_does_nothing(family: str, by: Any) -> None:
    """Heads and inner units that write nothing, and read nothing, can go without a trace."""
    model = model_of(family)
    dead_units, dead_heads = slice(8, 40), [slice(0, 8), slice(24, 32)]  # heads 0 and 3
    with torch.no_grad():
        for block in model.base_model.h if family == "gpt2" else model.base_model.layers:
            if family == "gpt2":
                block.mlp.c_fc.weight[:, dead_units] = block.mlp.c_proj.weight[dead_units] = 0
                block.mlp.c_fc.bias[dead_units] = 0
                for head in dead_heads:
                    block.attn.c_proj.weight[head] = 0
                    for part in range(3):
                        rows = slice(head.start + 32 * part, head.stop + 32 * part)
                        block.attn.c_attn.weight[:, rows] = block.attn.c_attn.bias[rows] = 0
            else:
                block.mlp.down_proj.weight[:, dead_units] = block.mlp.up_proj.weight[dead_units] = 0
                block.mlp.gate_proj.weight[dead_units] = 0
                for head in dead_heads:
                    block.self_attn.o_proj.weight[:, head] = block.self_attn.q_proj.weight[head] = 0
    cut = Width(heads=2, intermediate_size=32, by=by) if family != "gpt2" else Width(intermediate_size=96, by=by)
    made = cut(model, nll)
    torch.testing.assert_close(logits(made), logits(model), rtol=1e-5, atol=1e-5)
    if family != "gpt2":
        assert made.base_model.layers[0].self_attn.q_proj.weight.shape == (16, 32)
        assert made.config.num_key_value_heads == 2, "both stay, with one query each"
    else:
        made = Width(hidden_size=16, heads=2, by=by)(model, nll)
        alive = model.base_model.h[0].attn.c_attn.bias.view(3, 4, 8)[:, 1:3]
        assert torch.equal(made.base_model.h[0].attn.c_attn.bias.view(3, 2, 8), alive)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("by", ["activation", "magnitude"])
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3", "mistral", "smollm3"])
def test_channels_that_carry_nothing_go_without_a_trace(family: str, by: Any, tied: bool) -> None:
    """Norms take a mean over the channels, so theirs is the only weight that must change. LayerNorm's mean itself moves."""
    model, dead = model_of(family, tie_word_embeddings=tied, rms_norm_eps=1e-12), [0, 3, 7, 11, 12, 20, 30, 31]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[dead] = 0
            elif weight.ndim == 2:
                weight[:, dead] = 0
    made = Width(hidden_size=24, by=by)(model, nll)
    assert made.base_model.layers[0].mlp.up_proj.weight.shape == (64, 24)
    torch.testing.assert_close(logits(made), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_are_the_same_in_every_layer(family: str) -> None:
    """Against slices taken by hand, where the large channels are known."""
    model, large = model_of(family), torch.tensor([1, 2, 3, 5, 8, 13, 21, 27, 28, 29, 30, 31, 4, 6, 7, 9]).sort().values
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[:, large] *= 20
    made = Width(hidden_size=16, heads=2, by="magnitude")(model)
    assert torch.equal(made.get_input_embeddings().weight, embedding[:, large])
    if family == "gpt2":
        assert torch.equal(made.base_model.wpe.weight, model.base_model.wpe.weight[:, large])
        assert torch.equal(made.base_model.h[1].mlp.c_fc.weight, model.base_model.h[1].mlp.c_fc.weight[large])
        assert torch.equal(made.base_model.h[1].mlp.c_proj.weight, model.base_model.h[1].mlp.c_proj.weight[:, large])
    else:
        assert torch.equal(
            made.base_model.layers[1].mlp.up_proj.weight, model.base_model.layers[1].mlp.up_proj.weight[:, large]
        )
        assert torch.equal(
            made.base_model.layers[1].mlp.down_proj.weight, model.base_model.layers[1].mlp.down_proj.weight[large]
        )


@pytest.mark.parametrize(("heads", "kv"), [(8, 4), (4, 4), (2, 1), (6, 3)])
def test_queries_stay_with_their_key_value_head(heads: int, kv: int) -> None:
    model = model_of("qwen2", num_attention_heads=8, num_key_value_heads=4, width=64)
    made = Width(heads=heads)(model, nll)
    assert (made.config.num_attention_heads, made.config.num_key_value_heads) == (heads, kv)
    theirs, ours = model.base_model.layers[0].self_attn, made.base_model.layers[0].self_attn
    keys = theirs.k_proj.weight.view(4, 8, 64)
    queries = theirs.q_proj.weight.view(8, 8, 64)
    for i, query in enumerate(ours.q_proj.weight.view(heads, 8, 64)):
        (was,) = [j for j in range(8) if torch.equal(queries[j], query)]
        assert torch.equal(ours.k_proj.weight.view(kv, 8, 64)[i // (heads // kv)], keys[was // 2])


def idle(model: Any, layer: int) -> Any:
    """A model one of whose layers adds nothing."""
    block = (model.base_model.h if model.config.model_type == "gpt2" else model.base_model.layers)[layer]
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight", "c_proj.bias")):
                parameter.zero_()
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_layer_that_adds_nothing_has_no_influence(layer: int, family: str) -> None:
    model = idle(model_of(family, num_hidden_layers=4), layer)
    init = Layers(count=3, by="influence")
    choice = init.chosen(model, nll)
    assert choice.figures["keep"] == [i for i in range(4) if i != layer]
    torch.testing.assert_close(logits(init.cut(model, choice)), logits(model), rtol=1e-5, atol=1e-5)
    assert choice.figures["influence"][layer] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", [*FAMILIES, "sliding", "bloom", "falcon_h1"])  # the last two give tuples
def test_the_loss_of_a_removal_is_that_of_the_model_cut_so(family: str) -> None:
    """Layers that are skipped, and first layers that do not run again, against models that do not have the layers."""
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2} if family == "sliding" else {}
    mamba = {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
    }
    more = sliding | (mamba if family == "falcon_h1" else {})
    layers = 4 if family == "falcon_h1" else 5
    model = model_of("qwen2" if sliding else family, num_hidden_layers=layers, **more)
    figures = Layers(count=2).chosen(model, nll).figures
    assert figures["nll_before"] == pytest.approx(nll(model, 16), abs=1e-6)
    stays = set(range(layers))
    for removed in figures["removed"]:
        tried = {layer: nll(Layers(keep=tuple(sorted(stays - {layer})))(model), 16) for layer in stays}
        assert removed["layer"] == min(stays, key=lambda layer: tried[layer])
        assert removed["nll"] == pytest.approx(tried[removed["layer"]], abs=1e-6)
        stays.remove(removed["layer"])
    assert figures["keep"] == sorted(stays)


def test_block_influence_is_one_minus_the_cosine() -> None:
    """Against hidden states that transformers gives out."""
    model = model_of("qwen2", num_hidden_layers=3)
    with torch.no_grad():
        states = [*model.base_model(IDS_BT, output_hidden_states=True).hidden_states[:3]]
        states.append(model.base_model.layers[2](states[2], position_embeddings=rotary(model), attention_mask=None))
    found = Layers(count=1, by="influence").chosen(model, nll).figures["influence"]
    for layer, (before, after) in enumerate(pairwise(states)):
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        assert found[layer] == pytest.approx(float(1 - cosine.mean()), abs=1e-6)


def rotary(model: Any) -> Any:
    return model.base_model.rotary_emb(torch.zeros(1), torch.arange(IDS_BT.shape[1])[None])


def test_a_unit_that_is_never_active_goes_however_large_its_weights() -> None:
    model, silent = model_of("qwen2"), slice(0, 40)
    with torch.no_grad():
        for block in model.base_model.layers:
            block.mlp.up_proj.weight[silent] = 0
            block.mlp.down_proj.weight[:, silent] *= 100
    made = Width(intermediate_size=24)(model, nll)
    torch.testing.assert_close(logits(made), logits(model), rtol=1e-5, atol=1e-5)
    blind = Width(intermediate_size=24, by="magnitude")(model)
    assert not torch.allclose(logits(blind), logits(model), rtol=1e-2, atol=1e-2)


def test_rows_that_decide_must_be_given() -> None:
    with pytest.raises(UserError, match=r"init: rows decide what stays; give `nll`, or name the layers: keep = \[0, 2, …\]"):
        Layers(count=1)(model_of("qwen2"))


REFUSED = {
    "as many layers as there are": (Layers(count=2), "qwen2", "init.count = 2: the model has 2 layers; choose fewer than that"),
    "a layer that is not there": (
        Layers(keep=(0, 2)),
        "qwen2",
        "init.keep = [0, 2]: the model has 2 layers, 0 to 1; name some of these",
    ),
    "more channels": (Width(hidden_size=64), "qwen2", "init.hidden_size = 64: the model has 32; choose at most that"),
    "more units": (Width(intermediate_size=65), "llama", "init.intermediate_size = 65: the model has 64; choose at most that"),
    "more heads": (Width(heads=5), "gpt2", "init.heads = 5: the model has 4; choose at most that"),
    "half a group": (
        Width(heads=3),
        "qwen2",
        "init.heads = 3: the model has 2 key-value heads of 2 queries each; choose a multiple of 2",
    ),
    "Llama's rule": (
        Width(hidden_size=18),
        "llama",
        "init.hidden_size = 18: 4 heads do not divide it; choose another, or other heads",
    ),
    "GPT-2's rule": (
        Width(hidden_size=24),
        "gpt2",
        "init.hidden_size = 24: GPT-2's 4 heads of 8 do not fill it; set heads = 3",
    ),
    "GPT-2's rule, by heads": (
        Width(heads=2),
        "gpt2",
        "init.hidden_size = 32: GPT-2's 2 heads of 8 do not fill it; set hidden_size = 16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_is_refused_from_the_config_alone(case: str) -> None:
    init, family, expected = REFUSED[case]
    with pytest.raises(UserError) as caught:
        init.shape(model_of(family).config)
    assert str(caught.value) == expected


def test_a_cut_model_learns_as_any_other() -> None:
    model = Width(hidden_size=16, heads=2)(model_of("qwen2"), nll)
    loss = model(IDS_BT, labels=IDS_BT).loss
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
