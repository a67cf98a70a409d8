"""Rows end to end through a transformers model, each attending to itself alone."""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.core.errors import UserError
from potstill.edges.attention import Shared, attend_within, runs_of
from potstill.edges.checked import way_of
from potstill.edges.models import Model, check_positions

_NAME = "potstill_packed"
# keywords of an attention layer that change nothing of its result, or that `_attend` looks at
_KNOWN = {"position_ids", "cache_position", "use_cache", "output_attentions", "sliding_window", "softcap", "is_causal"}


class Tie:
    """Where the output head's matrix is the embedding's: lets the embedding's gradient, a few rows, join the head's.

    Autograd would fill another [V, D] with zeros for these rows and add the two.

    Attributes:
        gradient: the head's [V, D], from its backward pass to the embedding's, which follows in the same sweep.
    """

    def __init__(self) -> None:
        self.gradient: Tensor | None = None


def tie_of(model: Model) -> Tie | None:
    """A tie for one forward and backward pass; None where the two matrices differ, are not trained, or more than rows is read.

    Gemma's embedding multiplies what it reads: there autograd adds the two gradients.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight, plain = embedding.weight, type(embedding) is torch.nn.Embedding
    return Tie() if plain and head.weight is weight and weight.requires_grad and torch.is_grad_enabled() else None


class _TiedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, ids_T: Tensor, padding: int | None, tie: Tie) -> Tensor:
        ctx.shape, ctx.padding, ctx.tie = weight_VD.shape, padding, tie
        ctx.save_for_backward(ids_T)
        return F.embedding(ids_T, weight_VD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad_TD,), (ids_T,) = grad_outputs, ctx.saved_tensors
        if ctx.padding is not None:  # as torch's own embedding has it
            grad_TD = grad_TD.masked_fill((ids_T == ctx.padding)[:, None], 0)
        gradient_VD, ctx.tie.gradient = ctx.tie.gradient, None
        if gradient_VD is None:
            return grad_TD.new_zeros(ctx.shape).index_add_(0, ids_T, grad_TD), None, None, None
        return gradient_VD.index_add_(0, ids_T, grad_TD.to(gradient_VD.dtype)), None, None, None


def final_hidden(
    model: Model,
    ids_T: Tensor,
    position_T: Tensor,
    lengths: Sequence[int],
    tie: Tie | None = None,
    shared: Shared | None = None,
) -> Tensor:
    """Final hidden states [T, D] of documents laid end to end; equal to one document at a time, without any padding.

    Args:
        ids_T: token ids of all documents.
        position_T: position of each token in its document, from 0.
        lengths: tokens of each whole document; equal lengths side by side are attended in one call.
        tie: of this pass, see `tie_of`.
        shared: which documents a token belongs to, where some belong to several; None: each to one.

    Raises:
        UserError: a document is longer than the model's positions, or the model cannot be read exactly (see `way_of`).
    """
    check_positions(model.config, max(lengths), "the model")
    if not packs(model):
        return _batched_hidden(model, ids_T, lengths, tie, shared)
    return _packed_hidden(model, ids_T, position_T, lengths, tie, shared)


def read(model: Model, ids_T: Tensor, lengths: Sequence[int], *, packed: bool, shared: Shared | None = None) -> Tensor:
    """`final_hidden` by a way that is given, for whoever asks which one is exact; the model stays ready for that way."""
    tie = tie_of(model)
    if not packed:
        _release(model)
        return _batched_hidden(model, ids_T, lengths, tie, shared)
    position_F = torch.cat([torch.arange(length, device=ids_T.device) for length in lengths])
    return _packed_hidden(model, ids_T, position_F if shared is None else shared.keep(position_F), lengths, tie, shared)


def packs(model: Model) -> bool:
    """Whether rows may lie end to end; asked once of each model."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return True
    if model not in _WAYS:
        _WAYS[model] = way_of(model.config, read) == "packed"
    return _WAYS[model]


def shares(config: Any) -> bool:
    """Whether a model of this config reads what rows begin with once for all of them: where it packs."""
    with suppress(UserError):  # whoever reads with it says so
        return way_of(config, read) == "packed"
    return True


def check_exact(config: Any) -> None:
    """Refuse a model that neither packs nor batches read as it reads one row at a time; asked of a small copy.

    Raises:
        UserError: so it is; says by how much.
    """
    way_of(config, read)


_WAYS: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


def _packed_hidden(
    model: Model, ids_T: Tensor, position_T: Tensor, lengths: Sequence[int], tie: Tie | None, shared: Shared | None
) -> Tensor:
    from transformers import PreTrainedModel

    if not prepare(model) and isinstance(model, PreTrainedModel):
        raise UserError(f"the attention layers of a {type(model).__name__} are unknown; choose another model")
    if tie is None:
        tokens = {"input_ids": ids_T[None]}
    else:
        embedding = model.get_input_embeddings()
        tokens = {"inputs_embeds": _TiedEmbedding.apply(embedding.weight, ids_T, embedding.padding_idx, tie)[None]}
    # a mask of four dimensions is handed on as it is: none of [T, T] is built
    unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids_T.device)
    states = model.base_model(
        **tokens,
        position_ids=position_T[None],
        attention_mask=unused,
        use_cache=False,
        packed_lengths=tuple(lengths),
        packed_shared=shared,
    )
    return states.last_hidden_state[0]


def _batched_hidden(model: Model, ids_T: Tensor, lengths: Sequence[int], tie: Tie | None, shared: Shared | None) -> Tensor:
    """The same for layers that carry something from token to token: rows of one length are a batch, and nothing is padded.

    Each row is read from its first token on, what it shares with others too.
    """
    if tie is None:
        tokens_TX = ids_T
    else:
        embedding = model.get_input_embeddings()
        tokens_TX = _TiedEmbedding.apply(embedding.weight, ids_T, embedding.padding_idx, tie)
    tokens_FX = tokens_TX if shared is None else shared.spread(tokens_TX)
    parts, begin = [], 0
    for length, count in runs_of(lengths):
        end = begin + length * count
        rows = tokens_FX[begin:end].unflatten(0, (-1, length))
        states = model.base_model(**{"input_ids" if tie is None else "inputs_embeds": rows}, use_cache=False)
        parts.append(states.last_hidden_state.flatten(0, 1))
        begin = end
    states_FD = torch.cat(parts)
    return states_FD if shared is None else shared.keep(states_FD)


class _Packing:
    """The config that an attention layer sees: the model's own, but for the attention that it names.

    It stays in the layer, because gradient checkpointing runs layers again on the way back; the model's config is untouched.
    """

    _attn_implementation = _NAME

    def __init__(self, config: Any) -> None:
        self.plain = config

    def __getattr__(self, name: str) -> Any:
        if name == "plain":  # while it is copied
            raise AttributeError(name)
        return getattr(self.plain, name)


def prepare(model: Model) -> bool:
    """Let every attention layer ask `_attend`, which without lengths does what the model's config names.

    Returns:
        whether there is any attention layer of the kind that can be asked so.
    """
    _register()
    layers = [module for module in model.base_model.modules() if hasattr(module, "is_causal") and hasattr(module, "config")]
    for layer in layers:
        if not isinstance(layer.config, _Packing):
            layer.config = _Packing(layer.config)
    return bool(layers)


def _release(model: Model) -> None:
    """Undo `prepare`: some networks choose by the attention's name whether to mask what their attention does not see."""
    for module in model.base_model.modules():
        if isinstance(getattr(module, "config", None), _Packing):
            module.config = module.config.plain


@cache
def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)


def _plain_attention(module: Any) -> Callable[..., Any]:
    """What a layer would attend by, were it not for us."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = sys.modules[type(module).__module__].eager_attention_forward
    named = module.config.plain._attn_implementation
    return eager if named == "eager" else ALL_ATTENTION_FUNCTIONS[named]


def _attend(
    module: Any,
    query_BHTK: Tensor,
    key_BGTK: Tensor,
    value_BGTK: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_lengths: tuple[int, ...] | None = None,
    packed_shared: Shared | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention inside each document of a pack; without lengths, what the model's config names.

    Kernels for block-diagonal masks pay for the whole square; one call for each length does not.
    """
    if packed_lengths is None:
        if query_BHTK.shape[2] == 1 < query_BHTK.shape[1] // key_BGTK.shape[1] and _is_plain_sdpa(module, more):
            return _one_token(query_BHTK, key_BGTK, value_BGTK, attention_mask, dropout, scaling), None
        plain = _plain_attention(module)
        return plain(module, query_BHTK, key_BGTK, value_BGTK, attention_mask, dropout=dropout, scaling=scaling, **more)
    unknown = sorted(name for name, value in more.items() if name not in _KNOWN and value is not None)
    if unknown:
        raise UserError(f"the model's attention asks for {', '.join(unknown)}, which is not supported; choose another model")
    if more.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise UserError("the model's attention looks ahead; choose a causal language model")
    if packed_shared is not None:
        query_BHTK, key_BGTK, value_BGTK = (packed_shared.spread(t, dim=2) for t in (query_BHTK, key_BGTK, value_BGTK))
    within = attend_within(
        query_BHTK, key_BGTK, value_BGTK, packed_lengths, dropout, scaling, more.get("sliding_window"), more.get("softcap")
    )
    return (within if packed_shared is None else packed_shared.keep(within))[None], None


def _is_plain_sdpa(module: Any, more: dict[str, Any]) -> bool:
    """Whether a layer would attend by torch's own attention, and asks for nothing besides."""
    asked = {name for name, value in more.items() if value is not None}
    return module.config.plain._attn_implementation == "sdpa" and asked <= _KNOWN - {"softcap", "output_attentions"}


def _one_token(
    query_BH1K: Tensor, key_BGTK: Tensor, value_BGTK: Tensor, mask_B11T: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    """[B, 1, H, K]: queries that share keys lie side by side, so that keys and values are not copied for each of them."""
    B, H, _, K = query_BH1K.shape
    queries_BGRK = query_BH1K.view(B, key_BGTK.shape[1], -1, K)
    out_BGRK = F.scaled_dot_product_attention(queries_BGRK, key_BGTK, value_BGTK, mask_B11T, dropout_p=dropout, scale=scaling)
    return out_BGRK.reshape(B, 1, H, -1)
