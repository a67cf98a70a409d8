"""Rows in a pack are read as they are alone, and a pass leaves nothing behind in the model."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_parts import chat_tokenizer, rows, tiny_model

from potstill.core.errors import UserError
from potstill.core.types import Example
from potstill.data.batches import Batch, pack
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, instruction_pairs
from potstill.divergences.forward_kl import ForwardKL
from potstill.edges import packed
from potstill.edges.attention import attend_within
from potstill.edges.models import blocks_of, recomputed
from potstill.edges.packed import final_hidden
from potstill.losses.cross_entropy import CrossEntropy
from potstill.losses.distillation import Distillation
from potstill.teachers.signals import Live

Pairs = list[tuple[Any, Any]]


@pytest.fixture(scope="module")
def chat() -> Any:
    return chat_tokenizer()


def pairs_of(tokenizer: Any) -> Pairs:
    examples = [Example(str(i), row["instruction"], row["response"], row["context"]) for i, row in enumerate(rows(5))]
    return list(instruction_pairs(examples, Renderer(tokenizer, Prompts()), Counts()))


def hidden(model: Any, pairs: Pairs) -> torch.Tensor:
    batch = pack(pairs)
    return final_hidden(model, batch.ids_T, batch.position_T, batch.lengths)


def gradients_of(model: Any, pairs: Pairs) -> list[torch.Tensor]:
    model.train().zero_grad()
    loss = CrossEntropy()(model, pack(pairs))
    loss.total.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # its new name is not in every version
def test_gradient_checkpointing_changes_no_gradient(chat: Any, family: str, tied: bool, reentrant: bool) -> None:
    calm = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    model = tiny_model(family, len(chat), tie_word_embeddings=tied, **calm).double()
    plain = gradients_of(model, pairs_of(chat))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for a, b in zip(gradients_of(model, pairs_of(chat)), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
def test_layers_that_run_again_on_the_way_back_change_no_bit_and_keep_less(chat: Any, family: str) -> None:
    """Dropout included: GPT-2 has some."""
    model, kept = tiny_model(family, len(chat), num_hidden_layers=4), {}

    def trained(again: bool) -> list[torch.Tensor]:
        torch.manual_seed(3)
        stored: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with recomputed(model, again), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = gradients_of(model, pairs_of(chat))
        kept[again] = sum(stored.values())
        return found

    for a, b in zip(trained(True), trained(False), strict=True):
        assert torch.equal(a, b)
    assert kept[True] < kept[False]
    assert not any("forward" in vars(block) for block in blocks_of(model)), "the model is as it was"


PROMPTS: list[list[int]] = [[5], [6, 7, 8, 9, 10, 11, 12], [13, 14, 15], [16]]
GROUPS: dict[str, Pairs] = {
    "a prompt of one token": [(PROMPTS[0], [1, 2, 3]), (PROMPTS[0], [4])],
    "answers of no token and of one": [(PROMPTS[1], []), (PROMPTS[1], [3]), (PROMPTS[1], [3]), (PROMPTS[1], [1, 2])],
    "nothing but empty answers, and a row": [(PROMPTS[2], []), (PROMPTS[2], []), (PROMPTS[0], [1, 2])],
    "groups that lie among one another": [(PROMPTS[i % 3], [1 + i] * (1 + i // 2)) for i in range(8)],
    "groups beside rows of their own": [(PROMPTS[3], [9, 8]), *[(PROMPTS[1], [i, 2]) for i in range(3)], ([2, 3], [4, 5])],
}


def once(pairs: Pairs) -> list[bytes | None]:
    return [bytes(prompt) for prompt, _ in pairs]


def both_ways(model: Any, pairs: Pairs, objective: Any) -> list[tuple[torch.Tensor, ...]]:
    """Loss, its parts and gradients of rows that share their prompts, and of the same one by one."""
    found = []
    for laid in ([pack(pairs, None, once(pairs))], [pack([pair]) for pair in pairs]):
        model.zero_grad()
        losses = [objective(model, batch) for batch in laid]
        total = torch.stack([loss.total for loss in losses]).sum()
        total.backward()
        parts = [
            torch.stack([loss.parts[name] for loss in losses if name in loss.parts]).sum() for name in sorted(losses[-1].parts)
        ]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
        found.append((total.detach(), *parts, *gradients))
    return found


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("reads", ["packed", "batched"])
def test_a_prompt_that_rows_share_is_read_once_and_learned_for_each(group: str, family: str, reads: str) -> None:
    """Tied heads, learned and rotary positions, scaled embeddings, windows; and a model that reads every row whole."""
    calm = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    slides = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]} if "gemma" in family else {}
    student, teacher = (tiny_model(family, 40, seed=seed, **calm, **slides).double() for seed in (1, 2))
    packed._WAYS[student] = packed._WAYS[teacher] = reads == "packed"
    objective = Distillation(Live(teacher.requires_grad_(False)), ForwardKL(), 0.5, 1.0, 40)
    shared, alone = both_ways(student.train(), GROUPS[group], objective)
    # norms of all but GPT-2 are in float32, also on the way back, where gradients of rows are now added before
    near = {"rtol": 1e-10, "atol": 1e-12} if family == "gpt2" else {"rtol": 1e-5, "atol": 2e-6}
    for a, b in zip(shared, alone, strict=True):
        torch.testing.assert_close(a, b, **near)


def test_the_law_rejects_answers_that_see_one_another() -> None:
    model, pairs = tiny_model("qwen2", 40).double(), GROUPS["groups beside rows of their own"]

    def mixing(model: Any, batch: Batch) -> Any:
        assert batch.shared is not None or len(batch.lengths) == 1
        whole = replace(batch, shared=None, lengths=(len(batch.ids_T),))  # the pack as one document
        return CrossEntropy()(model, whole)

    shared, alone = both_ways(model, pairs, mixing)
    assert not torch.allclose(shared[0], alone[0], rtol=1e-3)


def test_a_pack_that_shares_is_not_read_as_one_that_does_not() -> None:
    """Lengths are of whole rows: without what says how tokens become these, reading ends in an error, not in a number."""
    pairs = GROUPS["groups beside rows of their own"]
    batch = pack(pairs, None, once(pairs))
    for packs in (True, False):
        model = tiny_model("qwen2", 40)
        packed._WAYS[model] = packs
        with pytest.raises(RuntimeError):
            final_hidden(model, batch.ids_T, batch.position_T, batch.lengths)


def test_several_threads_add_the_gradients_of_a_shared_prompt_in_one_order() -> None:
    model, threads = tiny_model("qwen2", 40, width=64), torch.get_num_threads()
    batch = pack([(PROMPTS[0], [i % 40]) for i in range(1200)], None, [b"5"] * 1200)
    torch.set_num_threads(4)
    try:
        found = [torch.autograd.grad(CrossEntropy()(model, batch).total, list(model.parameters())) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("again", ["our own", "reentrant"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # its new name is not in every version
def test_layers_that_run_again_read_shared_prompts_again(again: str) -> None:
    model = tiny_model("llama", 40).double().train()
    pairs = GROUPS["groups that lie among one another"]
    plain, _ = both_ways(model, pairs, CrossEntropy())
    if again == "reentrant":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with recomputed(model, again == "our own"):
        found, _ = both_ways(model, pairs, CrossEntropy())
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_shared_prompts_in_bfloat16_are_as_near_as_whole_rows() -> None:
    """Products of attention under autocast, which have a backward pass of their own."""
    model, pairs = tiny_model("qwen2", 40).train(), GROUPS["groups that lie among one another"]
    exact = both_ways(tiny_model("qwen2", 40).double().train(), pairs, CrossEntropy())[1]
    with torch.autocast("cpu"):
        shared, alone = both_ways(model, pairs, CrossEntropy())
    errors = [sum(float((a - b).square().sum()) for a, b in zip(each, exact, strict=True)) ** 0.5 for each in (shared, alone)]
    assert 0 < errors[0] < 1.5 * errors[1]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # its new name is not in every version
def test_two_packs_at_once_do_not_see_each_others_lengths(chat: Any) -> None:
    """Forward of one, forward of the other, backward of the first under checkpointing: the lengths travel with the pass."""
    model = tiny_model("llama", len(chat)).double().train()
    one, other = pairs_of(chat)[:2], pairs_of(chat)[2:]
    alone = gradients_of(model, one)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.zero_grad()
    first = CrossEntropy()(model, pack(one))
    CrossEntropy()(model, pack(other))
    first.total.backward()
    for parameter, expected in zip(model.parameters(), alone, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("way", ["sdpa", "eager"])
def test_a_model_attends_as_before_after_it_has_read_a_pack(chat: Any, family: str, way: str) -> None:
    model = tiny_model(family, len(chat))
    model.set_attn_implementation(way)
    ids_BT = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    mask_BT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    asked = {"attention_mask": mask_BT, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        before = model(ids_BT, attention_mask=mask_BT).logits, model.generate(ids_BT, **asked)
        hidden(model, pairs_of(chat))
        after = model(ids_BT, attention_mask=mask_BT).logits, model.generate(ids_BT, **asked)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert model.config._attn_implementation == way
    assert copy.deepcopy(model).config._attn_implementation == way


SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 8}


def windowed() -> Any:
    import transformers as t

    return t.Qwen2ForCausalLM(t.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=3, max_window_layers=1))


def capped() -> Any:
    import transformers as t

    return t.Gemma2ForCausalLM(t.Gemma2Config(**SHAPE, attn_logit_softcapping=0.5, sliding_window=3))


@pytest.mark.parametrize("made", [windowed, capped])
def test_windows_and_softcaps_of_attention_are_kept(made: Any) -> None:
    torch.manual_seed(0)
    model = made().double().eval()
    rows = [([1, 2], [3, 4, 5]), ([6], [7]), ([8, 9, 10, 11], [12, 13, 14])]
    alone = torch.cat([model.base_model(torch.tensor([[*p, *r]])).last_hidden_state[0] for p, r in rows])
    batch = pack(rows)
    together = final_hidden(model, batch.ids_T, batch.position_T, batch.lengths)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)  # Gemma's softmax and norms round to float32
    wide = copy.deepcopy(model)
    wide.config.attn_logit_softcapping = None
    for layer in wide.base_model.layers:
        layer.self_attn.sliding_window = layer.self_attn.attn_logit_softcapping = None
    assert not torch.allclose(final_hidden(wide, batch.ids_T, batch.position_T, batch.lengths), alone, atol=1e-3)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_no_row_runs_past_the_positions(family: str) -> None:
    limit = {"n_positions": 8} if family == "gpt2" else {"max_position_embeddings": 8}
    model = tiny_model(family, 40, **limit)
    hidden(model, [([1] * 4, [2] * 4)])
    with pytest.raises(UserError, match="a row has 9 tokens and the model 8 positions"):
        hidden(model, [([1] * 4, [2] * 4), ([1] * 4, [2] * 5)])


@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
def test_rows_beside_it_do_not_change_how_a_row_is_read(rope: str) -> None:
    """Rows that would change the frequencies of all are refused; with every other row, packed equals alone."""
    table: dict[str, Any] = {"rope_type": rope, "rope_theta": 10_000.0, "factor": 4.0}
    if rope == "longrope":
        table |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "original_max_position_embeddings": 8}
    model = tiny_model("llama", 40, rope_parameters=table, max_position_embeddings=32 if rope == "longrope" else 8).double()
    short, edge, long = ([1, 2], [3, 4]), ([5] * 4, [6] * 4), ([5] * 4, [6] * 5)
    alone = hidden(model, [short])
    torch.testing.assert_close(hidden(model, [edge, short])[-4:], alone, rtol=1e-12, atol=1e-13)
    with pytest.raises(UserError, match="a row has 9 tokens"):
        hidden(model, [long, short])
    torch.testing.assert_close(hidden(model, [short]), alone, rtol=0, atol=0)


@pytest.mark.parametrize("offset", [0.0, 6.0])
@pytest.mark.parametrize("size", [1.0, 3.0])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 5])
def test_attention_in_bfloat16_is_as_near_as_torchs_own(
    groups: int, window: int | None, size: float, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, against float64 on the same bfloat16 inputs; under autocast, as a layer calls it."""
    lengths = [3, 7, 7, 30]
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, sum(lengths), 16) for heads in (4, groups, groups))
    parts = [size * query, size * key + offset, value]  # large scores, and keys with a bias, as some models have them
    parts = [part.bfloat16().float() for part in parts]
    grad = torch.randn(sum(lengths), 4, 16)

    def found(dtype: torch.dtype, longest: int) -> list[torch.Tensor]:
        leaves = [part.to(dtype).requires_grad_() for part in parts]
        monkeypatch.setattr("potstill.edges.attention.LONGEST", longest)
        with torch.autocast("cpu", enabled=dtype == torch.float32):
            out = attend_within(*leaves, lengths, window=window)
        return [each.double() for each in (out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype)))]

    exact = found(torch.float64, 0)

    def errors(values: list[torch.Tensor]) -> list[float]:
        return [float((a - b).square().mean().sqrt()) for a, b in zip(values, exact, strict=True)]

    products, torchs = found(torch.float32, 512), found(torch.float32, 0)
    assert any(bool((a != b).any()) for a, b in zip(products, torchs, strict=True)), "two ways are compared"
    for ours, theirs in zip(errors(products), errors(torchs), strict=True):
        assert 0 < ours < 1.5 * theirs


@pytest.mark.parametrize("offset", [0.0, 6.0])
def test_capped_scores_in_bfloat16_are_as_near_as_others(offset: float) -> None:
    """Scores of a hundred and more are rounded to a half in bfloat16; a softcap of 200 leaves most of that."""
    lengths = [3, 7, 7, 30]
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, sum(lengths), 16) for _ in range(3))
    parts = [part.bfloat16().float() for part in (6 * query, 6 * key + offset, value)]

    def error(softcap: float | None) -> float:
        exact = attend_within(*(part.double() for part in parts), lengths, softcap=softcap)
        with torch.autocast("cpu"):
            found = attend_within(*parts, lengths, softcap=softcap)
        return float((found.double() - exact).square().mean().sqrt())

    assert 0 < error(200.0) < 1.5 * error(None)
