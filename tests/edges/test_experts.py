"""Mixtures of experts: what is counted, what a cut keeps, how files hold them, and what refuses them by name."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_parts import chat_tokenizer, write_rows
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from potstill.core.errors import UserError
from potstill.edges import checked
from potstill.edges.adapters import check_targets
from potstill.edges.experts import inner_units, is_mixture, layers_with_experts
from potstill.edges.models import blocks_of, check_cut, load_model, save_model, size_of, skeleton, weight_problems
from potstill.exporters.gguf import Gguf
from potstill.inits.layers import Layers
from potstill.inits.width import Width
from potstill.quant.int8 import int8_body
from potstill.quant.layers import width_problems
from potstill.recipe.parse import parse_recipe
from potstill.run.preflight import problems_of
from potstill.run.runner import run_recipe
from potstill.stages.outlook import Outlook
from potstill.train import probe

SHAPE: dict[str, Any] = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
SHAPE |= {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
CHOSEN = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS: dict[str, tuple[dict[str, Any], list[bool]]] = {  # which of four layers have experts
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, [True] * 4),
    "qwen2_moe": ({"num_experts": 4, "mlp_only_layers": [0, 1], **CHOSEN}, [False, False, True, True]),
    "qwen3_moe": ({"num_experts": 4, "decoder_sparse_step": 2, "head_dim": 8, **CHOSEN}, [False, True, False, True]),
    "glm4_moe": ({"n_routed_experts": 4, "first_k_dense_replace": 3, "head_dim": 8, **CHOSEN}, [False, False, False, True]),
    "ernie4_5_moe": (
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1, "moe_layer_end_index": 2},
        [False, True, True, False],
    ),
    "lfm2_moe": (
        {"num_experts": 4, "num_dense_layers": 2, "layer_types": ["full_attention", "conv"] * 2, **CHOSEN},
        [False, False, True, True],
    ),
    "cohere2_moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "layer_types": ["full_attention"] * 4}
        | {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]},
        [False, True, False, True],
    ),
}


@pytest.fixture(autouse=True)
def _theirs() -> Any:
    with warnings.catch_warnings():  # of networks, on their own configs
        warnings.simplefilter("ignore")
        yield


def config_of(family: str, **more: Any) -> Any:

    return CONFIG_MAPPING[family](**(SHAPE | KINDS[family][0] | more))


def model_of(family: str, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family, **more)).eval()


def has_experts(block: Any) -> bool:
    return any(weight.dim() == 3 and len(weight) == 4 for weight in block.parameters())


@pytest.mark.parametrize("family", KINDS)
def test_every_cut_keeps_each_layer_as_it_was(family: str) -> None:
    config, expected = config_of(family), KINDS[family][1]
    assert layers_with_experts(config) == expected == [has_experts(block) for block in blocks_of(skeleton(config))]
    for count in (1, 2, 3):
        for keep in itertools.combinations(range(4), count):
            made = [has_experts(block) for block in blocks_of(skeleton(check_cut(config, keep)))]
            assert made == [expected[layer] for layer in keep]


def test_layers_whose_place_decides_their_kind_are_not_cut() -> None:
    from transformers import JambaConfig

    own = {"num_experts": 4, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 1, "attn_layer_offset": 0}
    config = JambaConfig(**(SHAPE | own), use_mamba_kernels=False)
    with pytest.raises(
        UserError, match="layer 1 would be layer 0 of the cut model, where a 'jamba' places layers with experts"
    ):
        Layers(keep=(1, 3)).shape(config)


def test_a_token_passes_through_the_chosen_experts_alone() -> None:
    size = size_of(config_of("mixtral"))
    one = 3 * 32 * 64  # gate, up and down
    assert size.idle == 4 * 2 * one
    assert (
        size.active == 4 * (32 * (32 + 2 * 16 + 32) + 2 * 32 + 4 * 32 + 2 * one) + 32
    )  # attention, norms, router, two experts
    assert size.parameters == size.active + size.idle + 2 * 400 * 32
    assert size_of(config_of("qwen2_moe")).idle == 2 * 2 * 3 * 32 * 16, "two layers have experts"
    assert inner_units(config_of("mixtral")) == 2 * 64


@pytest.mark.parametrize(
    "family, units",
    [
        ("mixtral", 2 * 14_336),
        ("qwen3_moe", 8 * 768),
        ("qwen2_moe", 4 * 1_408 + 5_632),
        ("deepseek_v3", (8 + 1) * 2_048),
    ],
)
def test_inner_units_are_those_of_the_experts_not_of_dense_layers(family: str, units: int) -> None:
    """By the families' own defaults: chosen experts, and the shared ones; a dense layer may be wider."""
    config = CONFIG_MAPPING[family]()
    assert inner_units(config) == max(units, config.intermediate_size)


def test_a_weight_of_three_dimensions_is_no_expert_by_itself() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64}
    config = CONFIG_MAPPING["zamba"](num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2, **shape)
    model = skeleton(config)
    assert any(p.dim() == 3 for p in model.parameters())
    assert not is_mixture(model)


@pytest.mark.parametrize("family", KINDS)
def test_layers_that_are_timed_have_experts(family: str) -> None:
    for layers in (1, 2):
        timed = blocks_of(skeleton(probe._cut(config_of(family), layers, 64)))
        assert [has_experts(block) for block in timed] == [True] * layers


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "ernie4_5_moe"])
def test_files_hold_experts_apart_or_together(family: str, tmp_path: Path) -> None:
    model, chat = model_of(family), chat_tokenizer()
    save_model(model, chat, tmp_path)
    apart = load_file(tmp_path / "model.safetensors")
    first = next(name for name in sorted(apart) if ".experts.0." in name)
    assert weight_problems(f"path:{tmp_path}") == []
    tokens = torch.arange(4, 20)[None]

    def same() -> bool:
        return torch.equal(
            load_model(f"path:{tmp_path}")(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits
        )

    assert same()
    save_file({k: v for k, v in apart.items() if k != first}, tmp_path / "model.safetensors")
    assert f"1 weight is missing: '{first}'" in weight_problems(f"path:{tmp_path}")[0]
    save_file(apart | {first: apart[first][:-1].contiguous()}, tmp_path / "model.safetensors")
    assert f"'{first}' is" in weight_problems(f"path:{tmp_path}")[0]
    foreign = {first.replace("experts.0.", "experts.9."): apart[first].clone()}
    save_file(apart | foreign, tmp_path / "model.safetensors")
    assert "has no place in the model" in weight_problems(f"path:{tmp_path}")[0]
    save_file({k: v.clone().contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert weight_problems(f"path:{tmp_path}") == []
    assert same()


def test_the_small_copy_has_experts_where_the_first_layers_have_none() -> None:
    for family in KINDS:
        config = config_of(family)
        kinds = {KINDS[family][1][layer] for layer in checked._telling_layers(config)}
        assert kinds == set(KINDS[family][1])


def test_what_sees_linear_layers_alone_refuses_a_mixture() -> None:
    config = config_of("mixtral")
    mixture = "a 'mixtral' is a mixture of experts"
    assert mixture in width_problems(config, 32)[0]
    with pytest.raises(UserError, match=f"{mixture}.*set teacher_precision = 'bf16'"):
        int8_body(model_of("mixtral"))
    with pytest.raises(UserError, match=f"{mixture}.*name the layers to adapt"):
        check_targets(config, ("all-linear",))
    check_targets(config, ("q_proj",))
    with pytest.raises(UserError, match="mixtral"):
        Width(intermediate_size=32).shape(config)
    assert any("mixtral" in problem for problem in Gguf().problems(config, chat_tokenizer(), quantised=False))


@pytest.fixture(params=["qwen2_moe", "ernie4_5_moe"])  # the latter has a bias that never trains
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    chat = chat_tokenizer()
    save_model(model_of(request.param, vocab_size=len(chat)), chat, tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


def recipe(folder: Path, **kd: Any) -> dict[str, Any]:
    model = f"path:{folder / 'model'}"
    train = {"optim": {"steps": 2, "batch_size": 8, "lr": 3e-3, "precision": "bf16"}, "validation": {"times": 0}}
    stages: list[dict[str, Any]] = [
        {"name": "cut", "kind": "cut", "model": model, "init": {"kind": "layers", "count": 3, "rows": 4}},
        {"name": "sft", "kind": "sft", "model": "stage:cut", **train},
        {"name": "kd", "kind": "distill", "student": "stage:cut", "teacher": model, **train, **kd},
    ]
    named = (("SFT", "sft", "stage:sft"), ("KD", "kd", "stage:kd"), ("Teacher", "teacher", model))
    study = [{"name": name, "role": role, "model": ref} for name, role, ref in named]
    stages.append(
        {"name": "study", "kind": "evaluate", "study": study, "decoding": {"max_new_tokens": 4}, "metrics": ["rouge_l", "nll"]}
    )
    data = {"kind": "jsonl", "path": str(folder / "rows.jsonl"), "context": "context"}
    return {"name": "mixture", "data": data, "prompts": {"max_tokens": 128, "max_prompt_tokens": 96}, "stage": stages}


def test_a_mixture_goes_through_a_whole_recipe_in_bfloat16(folder: Path) -> None:
    made = run_recipe(parse_recipe(recipe(folder)), folder / "run")
    before, after = (load_model(f"path:{made[name].folder}") for name in ("cut", "kd"))
    moved = {name for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if not torch.equal(a, b)}
    assert any(name.endswith("experts.down_proj") for name in moved)
    assert any(name.endswith("mlp.gate.weight") for name in moved), "the router learns too"


def test_check_refuses_eight_bits_and_four_before_the_cost(folder: Path) -> None:
    asked = recipe(folder, teacher_precision="int8")
    asked["stage"].insert(1, {"name": "four", "kind": "quantize", "model": f"path:{folder / 'model'}"})
    found = {problem.place: problem.rule for problem in problems_of(parse_recipe(asked).stages, Outlook())}
    assert "int8 would leave them at full precision" in found["kd.teacher_precision"]
    assert "quantising would leave them at full precision" in found["four.group"]
