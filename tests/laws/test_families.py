"""Any family: what training, distilling, scoring, cutting, quantising, saving and loading make of a model is that model."""

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_parts import chat_tokenizer, rows

from potstill.core.errors import UserError
from potstill.core.types import Example
from potstill.data.batches import pack
from potstill.data.prompts import Prompts, Renderer
from potstill.data.rollout import Asked, Sampling
from potstill.data.store import Counts, instruction_pairs
from potstill.divergences.forward_kl import ForwardKL
from potstill.edges import checked
from potstill.edges.checked import LENGTHS, way_of
from potstill.edges.decoding import draw_answers
from potstill.edges.drawing import Drawing
from potstill.edges.families import logits_of
from potstill.edges.models import load_head, load_model, save_model
from potstill.edges.packed import read
from potstill.inits.layers import Layers
from potstill.losses.cross_entropy import CrossEntropy
from potstill.losses.distillation import Distillation
from potstill.losses.scoring import token_sums
from potstill.quant.layers import quantise_model
from potstill.rollouts.mixed import Mixed
from potstill.teachers.signals import HiddenForm, Live

VOCAB = 320
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"max_position_embeddings": 256, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
SLIDES = {"sliding_window": 8}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], **SLIDES}
OWN: dict[str, dict[str, Any]] = {  # beyond the common shape
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "llama": {},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "mistral": {"head_dim": 8, **SLIDES},
    "ministral": {"head_dim": 8, **MIXED},
    "gemma": {"head_dim": 8},
    "gemma2": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        **MIXED,
    },
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, **MIXED},
    "phi": {"partial_rotary_factor": 0.5, "resid_pdrop": 0.0},
    "phi3": {"resid_pdrop": 0.0},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "olmo": {},
    "olmo2": {},
    "olmo3": MIXED,
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "stablelm": {},
    "gptj": {"rotary_dim": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {"hidden_dropout": 0.0, "attention_dropout": 0.0, "tie_word_embeddings": False},
    "apertus": {"head_dim": 8},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "ernie4_5": {"head_dim": 8},
    "exaone4": {**MIXED},
    "seed_oss": {"head_dim": 8, "residual_dropout": 0.0, "attention_dropout": 0.0},
    "starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0, **SLIDES},
    "arcee": {},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, **MIXED},
    "helium": {"head_dim": 8},
    "nanochat": {},
    "hunyuan_v1_dense": {"head_dim": 8},
    "nemotron": {"head_dim": 8},
    "bloom": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "lfm2": {"layer_types": ["full_attention", "conv", "full_attention"], "block_auto_adjust_ff_dim": False},
}
DENSE = sorted(OWN)
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
LATENT |= {"v_head_dim": 8, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 32, "mlp_only_layers": [1], **EXPERTS},
    "qwen3_moe": {"num_experts": 4, "head_dim": 16, **EXPERTS},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {"topk_method": "greedy", **LATENT, **EXPERTS},
    "deepseek_v3": {"n_group": 2, "topk_group": 1, **LATENT, **EXPERTS},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, **MIXED},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 4.0},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1},
    "glm4_moe": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 8, **EXPERTS},
    "lfm2_moe": {
        "num_experts": 4,
        "num_dense_layers": 1,
        "layer_types": ["full_attention", "conv", "full_attention"],
        **EXPERTS,
    },
}
MIXTURES["ernie4_5_moe"]["moe_layer_end_index"] = 2
FAMILIES = [*DENSE, *sorted(MIXTURES)]


def config_of(family: str, more: dict[str, Any] | None = None) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[family](**(SHAPE | {"vocab_size": VOCAB} | ((OWN | MIXTURES)[family] if more is None else more)))


def model_of(family: str, seed: int = 0, more: dict[str, Any] | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(family, more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    if family in MIXTURES or (more is not None and "num_experts_per_tok" in more):
        model.set_experts_implementation("eager")  # torch has no grouped products in float64
    return model.double().eval()


@pytest.fixture(scope="module")
def chat() -> Any:
    return chat_tokenizer(VOCAB)


@pytest.fixture(autouse=True)
def _theirs() -> Any:
    with warnings.catch_warnings():  # of networks, on their own configs
        warnings.simplefilter("ignore")
        yield


def pairs_of(tokenizer: Any) -> Any:
    examples = [Example(str(i), row["instruction"], row["response"], row["context"]) for i, row in enumerate(rows(4))]
    return list(instruction_pairs(examples, Renderer(tokenizer, Prompts()), Counts()))


def plain_logp(model: Any, pairs: Any) -> list[torch.Tensor]:
    """Log-probabilities at response tokens by the model itself, one row at a time."""
    found = []
    for prompt, response in pairs:
        logits = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0]
        found.append(logits[len(prompt) - 1 : -1].log_softmax(-1))
    return found


def gradients(total: torch.Tensor, model: Any) -> torch.Tensor:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, trained, allow_unused=True) if g is not None])


def greedy(model: Any, prompt: list[int], stop_ids: Collection[int], new: int) -> list[int]:
    """The likeliest next token, again and again, reading everything each time."""
    ids = list(prompt)
    while len(ids) < len(prompt) + new:
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_what_it_is_alone(family: str, chat: Any, tmp_path: Path) -> None:
    student, teacher, pairs = model_of(family), model_of(family, seed=1), pairs_of(chat)
    batch, rtol = pack(pairs), 1e-5  # norms and softmaxes of some families round to float32
    logq, targets = plain_logp(student, pairs), [torch.tensor(response) for _, response in pairs]

    sft = CrossEntropy()(student, batch)
    plain = sum(F.nll_loss(q, t, reduction="sum") for q, t in zip(logq, targets, strict=True))
    torch.testing.assert_close(sft.total, plain, rtol=rtol, atol=0)
    ours, theirs = gradients(sft.total, student), gradients(plain, student)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=float(theirs.abs().max()) * 1e-5)

    more = [(pairs[0][0], pairs[1][1]), (pairs[1][0], pairs[2][1][:1]), (pairs[0][0], [])]
    prompts, logq_of_more = [repr(prompt).encode() for prompt, _ in [*pairs, *more]], plain_logp(student, more[:2])
    several = pack([*pairs, *more], None, prompts)
    assert len(several.ids_T) == len(batch.ids_T) + sum(len(response) for _, response in more)
    shared = CrossEntropy()(student, several)
    of_more = sum(F.nll_loss(q, torch.tensor(r), reduction="sum") for q, (_, r) in zip(logq_of_more, more, strict=False))
    torch.testing.assert_close(shared.total, plain + of_more, rtol=rtol, atol=0)
    ours, theirs = gradients(shared.total, student), theirs + gradients(of_more, student)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=float(theirs.abs().max()) * 1e-5)

    with torch.no_grad():
        logp = plain_logp(teacher, pairs)
        kl = sum((p.exp() * (p - q)).sum() for p, q in zip(logp, logq, strict=True))
        distilled = Distillation(Live(teacher), ForwardKL(), 1.0, 1.0, VOCAB)(student, batch)
        torch.testing.assert_close(distilled.total, kl, rtol=rtol, atol=0)
        kl_of_more = sum((p.exp() * (p - q)).sum() for p, q in zip(plain_logp(teacher, more[:2]), logq_of_more, strict=True))
        distilled = Distillation(Live(teacher), ForwardKL(), 1.0, 1.0, VOCAB)(student, several)
        torch.testing.assert_close(distilled.total, kl + kl_of_more, rtol=rtol, atol=0)
        form, live = HiddenForm(teacher.get_output_embeddings(), logits_of(teacher.config)), Live(teacher)
        kept = form.decode(form.encode(live(batch).hidden_ND), torch.device("cpu"))
        cached = Distillation(lambda _: kept, ForwardKL(), 1.0, 1.0, VOCAB)(student, batch)  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(cached.total, kl, rtol=0.05, atol=0)  # the cache rounds to bfloat16

        nats = token_sums(student, None, pairs, VOCAB, {"nll": lambda q, t, _: -q.gather(-1, t[:, None]).squeeze(-1)})["nll"]
        torch.testing.assert_close(torch.tensor(nats).sum().double(), plain.detach(), rtol=rtol, atol=0)

        cut = Layers(keep=(0, 2))(student)
        assert len(plain_logp(cut, pairs)) == len(pairs)
        assert cut.config.num_hidden_layers == 2
        save_model(cut.float(), chat, tmp_path / "cut")
        again = load_model(f"path:{tmp_path}/cut")
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), cut.state_dict().values(), strict=True))
        head, form_of_logits = load_head(f"path:{tmp_path}/cut")
        states = again.base_model(torch.tensor([pairs[0][0]]), use_cache=False).last_hidden_state
        shown = again(torch.tensor([pairs[0][0]]), use_cache=False).logits
        torch.testing.assert_close(form_of_logits(head(states)), shown, rtol=1e-4, atol=1e-4)

        prompts = [prompt for prompt, _ in pairs]
        wanted = [greedy(again, prompt, range(0, VOCAB, 8), 12) for prompt in prompts]
        for most in (64, 2):  # all together; two in flight, which others follow
            asked = {"stop_ids": range(0, VOCAB, 8), "max_new_tokens": 12, "drawing": Drawing(), "most": most}
            assert [each.ids for (each,) in draw_answers(again, prompts, **asked)] == wanted

        longest = max(len(prompt) for prompt, _ in pairs)
        ids_BT = torch.tensor([prompt + [1] * (longest - len(prompt)) for prompt, _ in pairs])
        mask_BT = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt, _ in pairs])
        calibration = [{"input_ids": ids_BT, "attention_mask": mask_BT}]
        if family in MIXTURES:
            with pytest.raises(UserError, match=f"a '{family}' is a mixture of experts, .* leave this model unquantised"):
                quantise_model(again, calibration, group=32)
            return
        packed = quantise_model(again, calibration, group=32).packed
        assert packed
        assert torch.isfinite(again(ids_BT).logits).all()


LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
STATES = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
HYBRIDS: dict[str, dict[str, Any]] = {
    "falcon_h1": {"head_dim": 8, "mamba_chunk_size": 4, **STATES},  # both kinds of state in each layer
    "qwen3_5_text": {"head_dim": 8, "layer_types": ["full_attention", "linear_attention", "full_attention"], **LINEAR},
    "lfm2": OWN["lfm2"],
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_rows_that_have_ended_leave_recurrent_states_too(family: str) -> None:
    model = model_of(family, more=HYBRIDS[family]).float()
    prompts = [[5, 6, 7], [9] * 9, [20, 30, 40, 50, 60], [7, 8] * 6]
    whole = [greedy(model, prompt, (), 12) for prompt in prompts]
    ends = (whole[0][2], whole[1][5])  # so that rows end apart
    alone = [greedy(model, prompt, ends, 12) for prompt in prompts]
    assert len({*map(len, alone)}) > 1
    found = draw_answers(model, prompts, stop_ids=ends, max_new_tokens=12, drawing=Drawing(0.0), scored=False)
    assert [each.ids for (each,) in found] == alone


def test_a_network_that_looks_at_chosen_tokens_alone_does_so_after_it_has_answered(chat: Any) -> None:
    sparse = {**LATENT, **EXPERTS, "n_group": 2, "topk_group": 1, "index_head_dim": 16, "index_n_heads": 2}
    pairs = pairs_of(chat)
    chosen = max(LENGTHS) + 1  # more tokens than the rows of the check have, fewer than these
    assert chosen < min(len(prompt) for prompt, _ in pairs)
    model = model_of("deepseek_v32", more=sparse | {"index_topk": chosen})
    dense = model_of("deepseek_v32", more=sparse | {"index_topk": 512})
    alone, targets = plain_logp(model, pairs), [torch.tensor(response) for _, response in pairs]
    plain = sum(F.nll_loss(q, t, reduction="sum") for q, t in zip(alone, targets, strict=True))
    others = sum(F.nll_loss(q, t, reduction="sum") for q, t in zip(plain_logp(dense, pairs), targets, strict=True))
    assert not torch.allclose(plain, others, rtol=1e-5), "the choice does something"  # pyright: ignore[reportArgumentType]
    draw_answers(model, [prompt for prompt, _ in pairs], stop_ids=(), max_new_tokens=2, drawing=Drawing(0.0), scored=False)
    torch.testing.assert_close(CrossEntropy()(model, pack(pairs)).total, plain, rtol=1e-5, atol=0)


def test_it_does_so_beside_a_teacher_too(chat: Any) -> None:
    sparse = {**LATENT, **EXPERTS, "n_group": 2, "topk_group": 1, "index_head_dim": 16, "index_n_heads": 2}
    (prompt, _), *_ = pairs_of(chat)
    model = model_of("deepseek_v32", more=sparse | {"index_topk": max(LENGTHS) + 1}).eval()
    with torch.no_grad():
        plain_V = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    (drawn,) = Mixed(model, model, chat, [], 0.2, len(plain_V))([Asked(tuple(prompt))], 1, Sampling(max_new_tokens=1), 0)
    assert drawn.logp_N.tolist() == pytest.approx([plain_V[drawn.ids[0]].item()], abs=1e-5)


@pytest.mark.parametrize("name", ["floor_scale", "log_scaling_n_floor", "attention_window_size", "index_topk"])
def test_the_copy_that_is_asked_is_read_beyond_every_threshold(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward

    def louder(self: Any, x: torch.Tensor) -> torch.Tensor:  # from a place in the pass on, as Llama 4's queries become
        return forward(self, x) * (1 + (torch.arange(x.shape[1]) >= getattr(self.config, name)))[:, None]

    config = config_of("llama")
    setattr(config, name, 8192)
    monkeypatch.setattr(LlamaMLP, "forward", louder)
    with pytest.raises(UserError, match="answers otherwise"):  # a pass of one token begins at the first place again
        way_of(config, read)


def test_what_takes_no_mask_when_it_answers_is_refused() -> None:
    """Mamba multiplies what it reads by the mask, which is longer than the one token that it reads of an answer."""
    from transformers import MambaConfig

    with pytest.raises(UserError, match="answers otherwise from its cache"):
        way_of(MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, vocab_size=VOCAB), read)


def test_there_are_enough_of_them() -> None:
    assert len(DENSE) >= 24


def test_what_reads_otherwise_is_refused_with_the_figure() -> None:
    config = config_of("gemma2")

    def broken(model: Any, ids_T: Any, lengths: Any, **more: Any) -> Any:
        return read(model, ids_T, lengths, **more) * (1 + 1e-3)

    with pytest.raises(UserError, match=r"cannot be read exactly: rows end to end differs by \d\.\de-0[34]"):
        way_of(config, broken)


def test_a_network_that_takes_its_neighbour_in_the_pack_for_the_token_before_does_not_pack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows end to end it reads as it reads one: there the token before lies where it looks. Behind a shared prompt not."""
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def mixing(self: Any, *args: Any, **more: Any) -> Any:
        out = forward(self, *args, **more)
        places_BT = more.get("position_ids")
        if places_BT is None:
            places_BT = torch.arange(out.last_hidden_state.shape[1])[None]
        before = out.last_hidden_state.roll(1, 1) * (places_BT > 0)[..., None]
        out.last_hidden_state = out.last_hidden_state + 1e-3 * before
        return out

    config = config_of("llama")
    config.rms_norm_eps = 5e-6  # a config that was not asked before
    monkeypatch.setattr(LlamaModel, "forward", mixing)
    monkeypatch.setattr(checked, "_check_answers", lambda *_: None)  # it would refuse: a pass of one token has no neighbour
    assert way_of(config, read) == "batched"


def test_experts_that_a_token_gets_by_its_place_in_the_pack_are_refused_with_the_figure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    forward = MixtralSparseMoeBlock.forward

    def of_little_capacity(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        out = forward(self, hidden_states)
        kept = torch.arange(out[..., 0].numel()).view(out.shape[:-1]) < 16  # tokens of one pass; later ones get no expert
        return out * kept[..., None]

    config = config_of("mixtral")
    config.rms_norm_eps = 4e-6  # a config that was not asked before
    monkeypatch.setattr(MixtralSparseMoeBlock, "forward", of_little_capacity)
    with pytest.raises(UserError, match=r"rows end to end differs by \d.*rows of one length as a batch differs by \d"):
        way_of(config, read)


ROPES: dict[str, dict[str, Any]] = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
}


@pytest.mark.parametrize("rope", ROPES)
def test_every_scaling_of_positions_is_read_as_the_model_reads_it(rope: str, chat: Any) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    scaling = {"rope_type": rope, "rope_theta": 10_000.0, **ROPES[rope]}
    config = LlamaConfig(**(SHAPE | {"vocab_size": VOCAB, "rope_parameters": scaling}))
    assert way_of(config, read) == "packed"
    torch.manual_seed(0)
    model, pairs = AutoModelForCausalLM.from_config(config).double().eval(), pairs_of(chat)
    plain = AutoModelForCausalLM.from_config(LlamaConfig(**(SHAPE | {"vocab_size": VOCAB}))).double().eval()
    plain.load_state_dict(model.state_dict())
    found, alone = CrossEntropy()(model, pack(pairs)).total, plain_logp(model, pairs)
    targets = [torch.tensor(response) for _, response in pairs]
    torch.testing.assert_close(found, sum(F.nll_loss(q, t, reduction="sum") for q, t in zip(alone, targets, strict=True)))
    other = CrossEntropy()(plain, pack(pairs)).total
    assert rope == "dynamic" or not torch.allclose(found, other, rtol=1e-6), "the scaling does something"


def test_a_head_that_nobody_has_described_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from potstill.edges import families

    config = config_of("granite")
    config.logits_scaling = 5.0
    monkeypatch.delitem(families.FAMILIES, "granite")
    with pytest.raises(UserError, match="makes its logits in a way that is unknown here"):
        way_of(config, read)


def test_the_check_is_the_same_inside_autocast_and_inference_and_leaves_random_numbers_alone() -> None:
    config = config_of("qwen3")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    config.rms_norm_eps = 3e-6  # a config that was not asked before
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert way_of(config, read) == "packed"
    assert torch.equal(torch.rand(1), expected)
