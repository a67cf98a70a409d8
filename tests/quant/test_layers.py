import copy

import pytest
import torch
from torch.nn import functional as F

from potstill.core.errors import UserError
from potstill.edges.codes import check_codes
from potstill.quant import layers as quant_layers
from potstill.quant.finished import Finished
from potstill.quant.hessian import Products
from potstill.quant.layers import quantise_model

VOCABULARY = 97


def tiny_model(family: str, *, tied: bool = False, width: int = 64):
    import transformers as t

    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "tie_word_embeddings": tied, "max_position_embeddings": 64}
    match family:
        case "qwen2":
            model = t.Qwen2ForCausalLM(t.Qwen2Config(**shape))
        case "qwen2-sliding":
            sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
            model = t.Qwen2ForCausalLM(t.Qwen2Config(**shape, **sliding))
        case "llama":
            model = t.LlamaForCausalLM(t.LlamaConfig(**shape))
        case "gemma3n" | "gemma4":  # layers 2 and 3 read keys and values of 0 and 1
            ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 16, "num_kv_shared_layers": 2}
            shape |= {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, **ends}
            shape |= {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 32}
            if family == "gemma4":
                model = t.Gemma4ForCausalLM(t.Gemma4TextConfig(**shape))
            else:
                more = {"laurel_rank": 32, "activation_sparsity_pattern": [0.0] * 4}
                model = t.Gemma3nForCausalLM(t.Gemma3nTextConfig(**shape, **more))
                for block in model.model.layers:
                    torch.nn.init.ones_(block.altup.correct_output_scale)  # at zero its last layers would read nothing
        case "bloom":  # its blocks give tuples
            sizes = {"hidden_size": width, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "tie_word_embeddings": tied}
            model = t.BloomForCausalLM(t.BloomConfig(**sizes))
        case _:
            model = t.GPT2LMHeadModel(
                t.GPT2Config(
                    n_embd=width,
                    n_layer=2,
                    n_head=4,
                    n_positions=64,
                    vocab_size=VOCABULARY,
                    tie_word_embeddings=tied,
                    bos_token_id=0,
                    eos_token_id=0,
                )
            )
    for parameter in model.parameters():  # the default of 0.02 leaves every layer's inputs alike
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def batches(*lengths: int, pad_to: int = 0, rows: int = 4) -> list[dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(1)
    made = []
    for length in lengths:
        ids = torch.randint(0, VOCABULARY, (rows, length), generator=random)
        extra = max(pad_to - length, 0)
        made.append({"input_ids": F.pad(ids, (0, extra)), "attention_mask": F.pad(torch.ones_like(ids), (0, extra))})
    return made


def layers_of(model) -> dict[str, torch.nn.Module]:
    blocks = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    kinds = ("Linear", "Conv1D")
    return {
        name: module for name, module in model.named_modules() if name.startswith(blocks) and module.__class__.__name__ in kinds
    }


def weight_OI(layer) -> torch.Tensor:
    return layer.weight if isinstance(layer, torch.nn.Linear) else layer.weight.T


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen2-sliding", "llama", "gpt2", "bloom"])
def test_every_linear_of_the_blocks_holds_its_packed_weights_and_nothing_else_moved(family: str, tied: bool) -> None:
    model = tiny_model(family, tied=tied)
    before = copy.deepcopy(model.state_dict())
    result = quantise_model(model, batches(24, 24))
    layers = layers_of(model)
    assert set(result.packed) == set(layers)
    assert result.kept == []
    for name, layer in layers.items():
        assert torch.equal(weight_OI(layer), result.packed[name].dequantise())
    untouched = before.keys() - {f"{name}.weight" for name in layers}
    assert {"lm_head.weight"} < untouched
    for name in untouched:
        assert torch.equal(model.state_dict()[name], before[name])


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "bloom"])
def test_gptq_beats_rounding_in_the_layers_and_in_the_model(family: str) -> None:
    def kl(quantised) -> float:
        unseen = batches(40)[0]["input_ids"]
        with torch.no_grad():
            p, q = (F.log_softmax(m(unseen).logits.double(), -1) for m in (tiny_model(family), quantised))
        return float((p.exp() * (p - q)).sum(-1).mean())

    by_method = {}
    for method in ("gptq", "rtn"):
        model = tiny_model(family)
        result = quantise_model(model, batches(48, 48, 48, 48, rows=8), method=method)
        by_method[method] = kl(model)
        for error in result.errors.values():
            if method == "gptq":
                assert error.gptq < error.rtn
            else:
                assert error.gptq is None
    assert by_method["gptq"] < by_method["rtn"]


@pytest.mark.parametrize(
    "family, make_up, embeddings",
    [
        ("qwen2", False, False),
        ("qwen2", True, True),
        ("gpt2", True, False),
        ("gemma3n", False, False),
        ("gemma3n", True, False),
        ("gemma4", True, False),
    ],
)
def test_layers_are_solved_on_the_inputs_of_the_quantised_model(family: str, make_up: bool, embeddings: bool) -> None:
    """Independent oracle: H from a plain forward of the finished model gives each layer's reported error again."""
    model = tiny_model(family)
    original = copy.deepcopy(model)
    rows = batches(24, 30)
    result = quantise_model(model, rows, make_up=make_up, sweeps=2, embeddings=embeddings)
    layers, originals = layers_of(model), layers_of(original)
    hessians = {name: Products(weight_OI(layer).shape[1]) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: hessians[name].add(inputs[0].clone()))
    with torch.no_grad():
        for batch in rows:
            model(batch["input_ids"])
    assert set(layers) == {*result.errors, *result.kept}
    assert all("altup" in name for name in result.kept), "Gemma3n's router runs twice in a block, others are four wide"
    for name in result.errors:
        wanted, h = weight_OI(originals[name]).detach().double(), hessians[name].sum_II
        error = wanted - weight_OI(layers[name]).detach().double()
        expected = torch.trace(error @ h @ error.T) / torch.trace(wanted @ h @ wanted.T)
        assert result.errors[name].gptq == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen2-sliding", "llama", "gpt2", "bloom"])
def test_padding_enters_no_hessian(family: str) -> None:
    plain = quantise_model(tiny_model(family), batches(20, 9))
    padded = quantise_model(tiny_model(family), batches(20, 9, pad_to=33))
    for name, error in plain.errors.items():
        assert padded.errors[name].rtn == pytest.approx(error.rtn, rel=1e-3)
    # the first set of layers sees no rounding before it, so nothing can have tipped over a half
    first = next(iter(plain.packed))
    assert torch.equal(plain.packed[first].codes_OI, padded.packed[first].codes_OI)


def test_a_layer_that_some_rows_do_not_reach_is_named() -> None:
    model = tiny_model("qwen2")
    block = model.model.layers[1]
    whole = block.mlp.forward
    block.mlp.forward = lambda x: whole(x) if x.shape[1] > 20 else x
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.gate_proj, .*up_proj: it runs for some calibration rows and not"):
        quantise_model(model, batches(24, 9))


def test_a_width_that_does_not_divide_is_kept_and_reported() -> None:
    model = tiny_model("qwen2", width=48)
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    heard = []
    result = quantise_model(model, batches(24), on_layer=lambda *event: heard.append(event))
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)
    assert "model.layers.0.self_attn.q_proj" in result.kept
    assert set(result.packed) == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    assert [event[1:3] for event in heard] == [(i, 14) for i in range(1, 15)]
    assert {event[0] for event in heard if event[3] is None} == set(result.kept)


def test_the_model_is_left_as_it_was_found_but_for_its_weights() -> None:
    model = tiny_model("gpt2").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    first = quantise_model(model, batches(24))
    assert model.training
    assert all(not module._forward_pre_hooks and "forward" not in vars(module) for module in model.modules())
    again = quantise_model(tiny_model("gpt2"), batches(24))
    for name, matrix in again.packed.items():
        assert torch.equal(first.packed[name].codes_OI, matrix.codes_OI)


def test_layers_sharing_an_input_are_solved_together_in_the_order_they_run() -> None:
    names = [name.split(".")[-1] for name in quantise_model(tiny_model("llama"), batches(16)).packed]
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert names == order * 2


def test_errors_name_the_layer_or_the_remedy() -> None:
    with pytest.raises(UserError, match="needs calibration rows"):
        quantise_model(tiny_model("qwen2"), [])
    model = tiny_model("qwen2")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj: the weights hold NaN"):
        quantise_model(model, batches(16))


# Going on where a killed run was


class Killed(Exception):
    pass


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bits(tmp_path) -> None:
    def killed_in_the_second_block(name: str, i: int, n: int, error: float | None) -> None:
        if i == n - 2:
            raise Killed

    rows, whole = batches(24, 30), tiny_model("qwen2")
    expected = quantise_model(whole, rows, make_up=True)
    finished = Finished(tmp_path / "blocks")
    with pytest.raises(Killed):
        quantise_model(tiny_model("qwen2"), rows, make_up=True, finished=finished, on_layer=killed_in_the_second_block)
    assert finished.read(0) is not None
    assert finished.read(1) is None
    heard: list[str] = []
    again = tiny_model("qwen2")
    result = quantise_model(again, rows, make_up=True, finished=finished, on_layer=lambda name, i, n, error: heard.append(name))
    assert len(heard) == 8  # one line for the block that was there
    assert (result.errors, list(result.packed)) == (expected.errors, list(expected.packed))
    for name, matrix in expected.packed.items():
        assert torch.equal(result.packed[name].codes_OI, matrix.codes_OI)
        assert torch.equal(result.packed[name].scales_OG, matrix.scales_OG)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


@pytest.mark.parametrize("file", ["block-0000.safetensors", "block-0000.json"])
def test_a_damaged_block_is_solved_again(tmp_path, file: str) -> None:
    finished, rows = Finished(tmp_path), batches(24)
    expected = quantise_model(tiny_model("qwen2"), rows, finished=finished)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-9])
    assert finished.read(0) is None
    assert quantise_model(tiny_model("qwen2"), rows, finished=finished).errors == expected.errors


# Each block runs once


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "bloom"])
def test_a_layer_runs_once_on_each_batch_with_its_rounded_weights(family: str, method: str) -> None:
    """And once more on the first, by which it is known what reads what."""
    model = tiny_model(family)
    seen: dict[str, list[tuple[int, torch.Tensor]]] = {name: [] for name in layers_of(model)}
    for name, layer in layers_of(model).items():

        def hear(layer, inputs, _, heard=seen[name]) -> None:
            if inputs[0].shape[1] > 1:  # one token is for seeing what a block gives
                heard.append((inputs[0].shape[1], layer.weight.detach().clone()))

        layer.register_forward_hook(hear)
    quantise_model(model, batches(24, 30, 9), method=method, make_up=False)
    for name, layer in layers_of(model).items():
        assert [length for length, _ in seen[name]] == [24, 24, 30, 9]
        assert [torch.equal(weight, layer.weight) for _, weight in seen[name]] == [False, True, True, True]


def test_rows_solved_apart_are_those_solved_together(monkeypatch: pytest.MonkeyPatch) -> None:
    together = quantise_model(tiny_model("qwen2"), batches(24, 30), make_up=True)
    monkeypatch.setitem(quant_layers.AT_ONCE, "cpu", 7 * 64)
    apart = quantise_model(tiny_model("qwen2"), batches(24, 30), make_up=True)
    for name, matrix in together.packed.items():
        assert torch.equal(apart.packed[name].codes_OI, matrix.codes_OI)
        assert apart.errors[name].gptq == pytest.approx(together.errors[name].gptq, rel=1e-9)


# What counts, and what else is rounded


def test_a_position_of_weight_two_counts_as_two_rows() -> None:
    once, twice = Products(3), Products(3)
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    once.add(torch.cat([x, x[1:2]]))
    twice.add(x, torch.tensor([1.0, 2.0, 1.0, 1.0]))
    assert torch.allclose(once.sum_II, twice.sum_II)
    once, twice, y = Products(3, symmetric=False), Products(3, symmetric=False), x.flip(1)
    once.add(torch.cat([x, x[1:2]]), y=torch.cat([y, y[1:2]]))
    twice.add(x, torch.tensor([1.0, 2.0, 1.0, 1.0]), y=y)
    assert torch.allclose(once.sum_II, twice.sum_II)


def test_a_position_without_weight_is_not_seen() -> None:
    rows = batches(24)
    rows[0]["weight"] = torch.ones(4, 24)
    rows[0]["weight"][:, 20:] = 0
    first = "model.layers.0.self_attn.q_proj"
    cut = [{name: values[:, :20] for name, values in batches(24)[0].items()}]
    seen = [quantise_model(tiny_model("qwen2"), batch).packed[first].codes_OI for batch in (rows, cut, batches(24))]
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_embeddings_and_head_are_rounded_to_eight_bits_where_asked_for(family: str, tied: bool) -> None:
    model = tiny_model(family, tied=tied)
    before = copy.deepcopy(model.state_dict())
    result = quantise_model(model, batches(24), embeddings=True)
    ends = {name: matrix for name, matrix in result.packed.items() if matrix.bits == 8}
    assert len(ends) == (1 if tied else 2)
    check_codes(model, result.packed)
    for name, matrix in ends.items():
        was, now = before[f"{name}.weight"], model.state_dict()[f"{name}.weight"]
        assert torch.equal(now, matrix.dequantise())
        assert not torch.equal(now, was)
        assert (now - was).abs().max() <= matrix.scales_OG.float().abs().max()
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied


def test_eight_bits_are_far_nearer_than_four() -> None:
    errors = {bits: quantise_model(tiny_model("llama"), batches(24, 24), bits=bits).errors for bits in (4, 8)}
    assert all(error.gptq < 0.02 * errors[4][name].gptq for name, error in errors[8].items())


def test_inputs_that_are_not_finite_name_the_layer() -> None:
    model = tiny_model("qwen2")
    model.model.layers[1].input_layernorm.weight.data[0] = torch.nan
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.q_proj, .*v_proj: its calibration inputs hold NaN"):
        quantise_model(model, batches(16))


@pytest.mark.parametrize("make_up", [False, True])
def test_errors_are_of_the_weights_of_full_precision_whatever_codes_are_solved_for(make_up: bool) -> None:
    """The last layer's, recomputed from what it reads in the finished model."""
    rows, whole, model = batches(24), tiny_model("qwen2"), tiny_model("qwen2")
    name = "model.layers.1.mlp.down_proj"
    result = quantise_model(model, rows, make_up=make_up)
    heard: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    with torch.no_grad():
        model(**{key: rows[0][key] for key in ("input_ids", "attention_mask")})
    x_NI = heard[0][rows[0]["attention_mask"] > 0].double()
    exact_OI = whole.get_submodule(name).weight.detach().double()
    off_NO = x_NI @ (exact_OI - result.packed[name].dequantise().double()).T
    error = float(off_NO.square().sum() / (x_NI @ exact_OI.T).square().sum())
    assert result.errors[name].gptq == pytest.approx(error, rel=1e-4)


def test_making_up_for_earlier_errors_brings_the_model_nearer() -> None:
    """The outputs of the model of full precision, on rows that calibrated nothing."""
    unseen = batches(40)[0]["input_ids"]
    off = {}
    for make_up in (False, True):
        model = tiny_model("llama")
        found = quantise_model(model, batches(48, 48, 48, 48, rows=16), make_up=make_up)
        with torch.no_grad():
            p, q = (F.log_softmax(m(unseen).logits.double(), -1) for m in (tiny_model("llama"), model))
        off[make_up] = float((p.exp() * (p - q)).sum(-1).mean())
        shares = {name: error.made_up for name, error in found.errors.items()}
        assert shares["model.layers.0.self_attn.q_proj"] == 0, "nothing was rounded before it"
        assert make_up == (min(share for name, share in shares.items() if "layers.1" in name) > 0)
        assert max(shares.values()) <= 1
    assert off[True] < off[False]
