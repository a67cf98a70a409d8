"""Language models as the Hub stores them: loading, saving, sizes."""

import copy
import re
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.core.artifact import read_json, write_json
from potstill.core.errors import UserError
from potstill.edges import gguf_files
from potstill.edges.experts import idle_parameters, is_mixture, keep_experts, names_experts, refuse_other_layers
from potstill.edges.families import Logits, logits_of
from potstill.edges.hub import (
    INDEX,
    WEIGHTS,
    commit_of,
    files_of,
    folder_of,
    gguf_of,
    hub_errors,
    hub_name,
    library,
    refuse_remote_code,
)
from potstill.edges.known import KNOWN
from potstill.edges.vocabulary import (
    Model,
    Tokenizer,
    check_known,
    check_rows,
    check_vocabulary,
    form_of,
    load_tokenizer,
    other_tokens,
    own_tokens,
    shared_vocabulary,
)
from potstill.edges.weights import PACKED, Stored, bits_of, bytes_of, content_id, header_of, stored_in, weight_files

MASKED = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "codegen")  # older files hold their causal masks
PLAIN = ("F64", "F32", "F16", "BF16")  # as safetensors spells them

__all__ = [  # what lies in the rooms beside is asked for here as well
    "PACKED",
    "Model",
    "Size",
    "Tokenizer",
    "bits_of",
    "blocks_name",
    "blocks_of",
    "bytes_of",
    "check_cut",
    "check_known",
    "check_positions",
    "check_rows",
    "check_vocabulary",
    "config_of",
    "content_id",
    "cut_layers",
    "device",
    "form_of",
    "head_width",
    "linears_in",
    "load_head",
    "load_model",
    "load_tokenizer",
    "matrices_in",
    "other_tokens",
    "own_tokens",
    "per_layer",
    "positions_of",
    "recomputed",
    "ropes_of",
    "save_model",
    "shared_vocabulary",
    "size_of",
    "weight_files",
    "weight_problems",
    "with_weights",
]


def device() -> Any:
    """The accelerator when there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def config_of(where: str, offline_shape: bool = False) -> Any:
    """The transformers config of `path:…` or `hf:…`; with `offline_shape` the shipped table is asked before the hub.

    Of a folder, `tie_word_embeddings` is what its weights say: a head that differs from the embedding is not tied to it.
    """
    if (gguf := gguf_of(where)) is not None:
        return gguf_files.config_of(gguf_files.read(where, gguf))
    transformers = library()
    folder = folder_of(where)
    if folder is not None:
        try:
            config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        except (ValueError, OSError) as error:
            refuse_remote_code(where, error)
            raise UserError(f"{where}: config.json cannot be read ({str(error).splitlines()[0][:160]})") from error
    else:
        name, revision = hub_name(where)
        if offline_shape and name in KNOWN:
            shape = dict(KNOWN[name])
            return transformers.AutoConfig.for_model(shape.pop("model_type"), **shape)
        with hub_errors(name):
            commit = commit_of(name, revision)
            config = transformers.AutoConfig.from_pretrained(name, revision=commit, trust_remote_code=False)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{where}: a model of type '{config.model_type}' is no causal language model; choose one that is")
    if folder is not None and config.tie_word_embeddings and any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        config.tie_word_embeddings = _tied(config, stored_in(weight_files(folder)))
    _check_windows(where, config)
    return config


def _check_windows(where: str, config: Any) -> None:
    """Refuse windows of attention that the network does not have, or that have no size.

    transformers takes the size of a generation's cache from these fields even where the forward pass ignores them, so that
    such a model would answer as another than the one that is scored.
    """
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if config.model_type in ("llama", "gpt2"):
        field = "layer_types" if kinds else "sliding_window" if window else "attention_chunk_size" if chunk else ""
        if field:
            raise UserError(
                f"{where}: {field} asks for windows of attention, which {config.model_type} does not have; remove it"
            )
    elif config.model_type != "qwen2":
        return
    elif kinds and kinds != ["sliding_attention"]:
        raise UserError(f"{where}: layer_types names {', '.join(kinds)}; known are full_attention and sliding_attention")
    elif kinds and not window:
        raise UserError(
            f"{where}: layer_types names sliding_attention, but the config has no window; set sliding_window and "
            "use_sliding_window, or layer_types to full_attention"
        )


def load_model(where: str, dtype: Any = None) -> Model:
    """The causal language model of `path:…` or `hf:…`, in float32 by default, on `device()`, in evaluation mode.

    Raises:
        UserError: no such folder, no safetensors, truncated weights, weights that do not fit the config (`weight_problems`),
            an adapter beside the model, hub out of reach.
    """
    import torch

    config, stored = _checked(where)
    if gguf_of(where) is not None:
        return _from_tensors(config, stored, dtype).to(device()).eval()
    folder = files_of(where)
    try:
        model, info = library().AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype or torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise UserError(f"{where}: the weights do not fit config.json ({str(error).splitlines()[0][:160]})") from error
    left = sorted({*info["missing_keys"], *(name for name in info["unexpected_keys"] if not _harmless(name, config))})
    assert not left, f"weight_problems overlooked {left}"
    return model.to(device()).eval()


def weight_problems(where: str) -> list[str]:
    """What in a model's weight files does not fit its config.json, each in words; from the files' headers alone.

    A weight that is missing, that has another shape, that has no place in the described model (biases without their flag,
    layers beyond the last, another tower), or that is stored as codes. Buffers that every model can make again are no
    problem, nor is an output head beside a tied embedding: see `config_of`.

    Raises:
        UserError: there are no weights, or their files are damaged; as `config_of`.
    """
    config = config_of(where)
    return _problems(config, _stored(where, config), _described(where))


def _described(where: str) -> str:
    """What says how a model is built."""
    return "config.json" if gguf_of(where) is None else "the file's header"


def _stored(where: str, config: Any) -> dict[str, Stored]:
    """All tensors of a model's weight files by name."""
    if (gguf := gguf_of(where)) is not None:
        return gguf_files.stored_in(gguf_files.read(where, gguf), config, _shapes(config))
    return stored_in(weight_files(files_of(where)))


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Of all weights of a network, by the names that it has for them."""
    return {name: tuple(tensor.shape) for name, tensor in skeleton(config).state_dict().items()}


def _shapes_of(config: Any, stored: Container[str]) -> dict[str, tuple[int, ...]]:
    """Of all weights by the names that these files have: a matrix for each expert, or all of them in one tensor."""
    model = skeleton(config)
    native = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if not is_mixture(model):
        return native
    apart = {name: tuple(tensor.shape) for name, tensor in _as_files_have_it(model).items()}
    return apart if any(name in stored for name in apart if name not in native) else native


def _as_files_have_it(model: Model) -> dict[str, Any]:
    """A model's tensors as transformers would save them."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # an older transformers, which saves them as it has them
        return model.state_dict()
    return revert_weight_conversion(model, model.state_dict())


def _from_tensors(config: Any, stored: dict[str, Stored], dtype: Any) -> Model:
    """A model with the weights of a file that transformers does not load itself."""
    transformers = library()
    weights = {name: tensor.read(name) for name, tensor in stored.items()}
    model, info = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    left = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    assert not left, f"weight_problems overlooked {left}"
    ends = {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in ("eos", "bos", "pad")}
    model.generation_config = transformers.GenerationConfig(**ends)
    return model


def _checked(where: str) -> tuple[Any, dict[str, Stored]]:
    """A model's config, tied or not as its weights are, and its weights, which fit it."""
    config = config_of(where)
    stored = _stored(where, config)
    config.tie_word_embeddings = _tied(config, stored)
    problems = _problems(config, stored, _described(where))
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")
    return config, stored


def _problems(config: Any, stored: dict[str, Stored], described: str) -> list[str]:
    if getattr(config, "transformers_weights", None) not in (None, WEIGHTS):
        return [f"config.json names weights of its own (transformers_weights); call the file {WEIGHTS} and remove the field"]
    shapes = _shapes_of(config, stored)
    names = _names(config)
    found = {names.of_model(name, shapes): tensor for name, tensor in stored.items()}
    problems = []
    if len(found) < len(stored):
        twice = next(name for name in stored if name not in found)
        problems.append(f"'{twice}' is stored twice, with and without '{names.prefix}'; copy or download the weights again")
    if config.tie_word_embeddings and found.keys() & {names.head, names.embedding}:  # one of the two says it all
        shapes = {name: shape for name, shape in shapes.items() if name in found or name not in (names.head, names.embedding)}
    wrong = sorted(name for name, shape in shapes.items() if name in found and found[name].shape != shape)
    if wrong:
        seen = f"'{wrong[0]}' is {found[wrong[0]].shape}, {described} asks for {shapes[wrong[0]]}"
        problems.append(f"the weights do not fit {described}: {seen}; take both from one model")
    missing = sorted(shapes.keys() - found.keys())
    if missing:
        lost = "1 weight is missing:" if len(missing) == 1 else f"{len(missing)} weights are missing, the first is"
        own = "; if the head is the embedding's matrix, set tie_word_embeddings to true in config.json"
        what = "folder" if described == "config.json" else "file"
        problems.append(f"{lost} '{missing[0]}'; the {what} is not complete{own if missing == [names.head] else ''}")
    foreign = sorted(name for name in found if name not in shapes and not _harmless(name, config))
    if foreign:
        lost = "1 weight has" if len(foreign) == 1 else f"{len(foreign)} weights have"
        first = "it is" if len(foreign) == 1 else "the first is"
        problems.append(
            f"{lost} no place in the model that {described} describes, {first} '{foreign[0]}'; without it this would be "
            f"another model: take {described} and weights from one model"
        )
    coded = sorted(name for name in shapes.keys() & found.keys() if found[name].dtype not in PLAIN)
    if coded:
        problems.append(f"'{coded[0]}' is stored as {found[coded[0]].dtype}, and only {', '.join(PLAIN)} are read")
    return problems


@dataclass(frozen=True)
class _Names:
    """What an architecture calls its head and embedding, and what its files may leave out before a name."""

    head: str
    embedding: str
    prefix: str
    renamed: tuple[tuple[str, str], ...] = ()  # patterns of stored names that transformers knows by others, and these

    @property
    def bias(self) -> str:
        return f"{self.head.removesuffix('weight')}bias"

    def of_model(self, stored: str, known: Container[str]) -> str:
        """The model's name of a stored tensor: files of GPT-2 say `wte.weight` for `transformer.wte.weight`."""
        tried = [stored, f"{self.prefix}{stored}", *(re.sub(pattern, name, stored) for pattern, name in self.renamed)]
        return next((name for name in tried if name in known), stored)


def _names(config: Any) -> _Names:
    """By the config's type alone, which decides what its network calls its parts."""
    if type(config) not in _KNOWN_NAMES:
        _KNOWN_NAMES[type(config)] = _names_in(config)
    return _KNOWN_NAMES[type(config)]


_KNOWN_NAMES: dict[type, _Names] = {}


def _names_in(config: Any) -> _Names:
    untied = copy.deepcopy(config)
    untied.tie_word_embeddings = False
    model = skeleton(untied)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    head, embedding = (names[id(layer.weight)] for layer in (model.get_output_embeddings(), model.get_input_embeddings()))
    return _Names(head, embedding, f"{model.base_model_prefix}.", _renamed(model))


def _renamed(model: Model) -> tuple[tuple[str, str], ...]:
    """What transformers renames of a file while it loads: Pythia's `embed_out` is `lm_head` to it."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # an older transformers, which renames nothing
        return ()
    found = [one for one in get_model_conversion_mapping(model) if type(one) is WeightRenaming]
    return tuple(pair for one in found for pair in zip(one.source_patterns, one.target_patterns, strict=False))


def _tied(config: Any, stored: dict[str, Stored]) -> bool:
    """Whether head and embedding are one matrix: as config.json says, unless the file holds two that differ."""
    ends = _ends(config, stored)
    if not config.tie_word_embeddings or len(ends) < 2:
        return bool(config.tie_word_embeddings)
    (one, head), (other, embedding) = ends.values()
    return (head.dtype, head.shape) == (embedding.dtype, embedding.shape) and head.read(one).equal(embedding.read(other))


def _ends(config: Any, stored: dict[str, Stored]) -> dict[str, tuple[str, Stored]]:
    """Of head and embedding those that are stored: by the model's name, the file's name and the tensor."""
    names = _names(config)
    known = (names.head, names.embedding)
    found = {names.of_model(name, known): (name, tensor) for name, tensor in stored.items()}
    return {name: found[name] for name in known if name in found}


def _harmless(name: str, config: Any) -> bool:
    """Whether a stored tensor is a buffer that the model makes by itself: rotary frequencies, GPT-2's causal masks."""
    masks = config.model_type in MASKED and re.search(
        r"(^|\.)(h|layers)\.\d+\.(attn|attention|attn\.attention)\.(masked_)?bias$", name
    )
    return bool(masks or re.search(r"(^|\.)rotary_emb\.inv_freq$", name))


def load_head(where: str, dtype: Any = None) -> tuple[Any, Logits]:
    """The output layer of `load_model` alone, frozen, on `device()`, and what is done to its products; the body is not read.

    Raises:
        UserError: as `load_model`.
    """
    import torch

    config, stored = _checked(where)
    ends = _ends(config, stored)
    names = _names(config)
    wanted = [names.embedding, names.head] if config.tie_word_embeddings else [names.head]
    stored_name, tensor = next(ends[name] for name in wanted if name in ends)
    weight = tensor.read(stored_name)
    bias = {names.of_model(name, (names.bias,)): (name, tensor) for name, tensor in stored.items()}.get(names.bias)
    head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    head.weight = torch.nn.Parameter(weight.to(device(), dtype or torch.float32), requires_grad=False)
    if bias is not None:
        stored_name, tensor = bias
        values = tensor.read(stored_name)
        head.bias = torch.nn.Parameter(values.to(device(), dtype or torch.float32), requires_grad=False)
    return head, logits_of(config)


def head_width(config: Any) -> int:
    """Entries of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def positions_of(config: Any) -> int | None:
    """The most tokens that a row may have; None where nothing bounds it.

    Positions that the model has; where its rotary frequencies depend on the longest row of a pass (longrope, dynamic), the
    tokens up to which they do not.
    """
    limit = getattr(config, "max_position_embeddings", None)
    bounds = [limit] if limit else []
    bounds += [rope["original_max_position_embeddings"] for rope in ropes_of(config) if rope.get("rope_type") == "longrope"]
    return min(bounds, default=None)


def check_positions(config: Any, tokens: int, who: str) -> None:
    """Refuse rows longer than a model can read, by its config alone.

    Args:
        tokens: of the longest row, its response or answer included.
        who: whose config it is, for the message.

    Raises:
        UserError: the model has fewer positions, or reads longer rows otherwise than short ones.
    """
    limit = positions_of(config)
    if limit is None or tokens <= limit:
        return
    if limit < config.max_position_embeddings:
        raise UserError(
            f"{who}: a row has {tokens:,} tokens, and in a pass with more than {limit:,} the model counts positions by other "
            f"frequencies (rope type longrope), also in the rows beside it; lower prompts.max_tokens to {limit}"
        )
    raise UserError(
        f"{who}: a row has {tokens:,} tokens and the model {limit:,} positions; lower prompts.max_tokens to {limit} "
        "and prompts.max_prompt_tokens to less, or choose a model with more"
    )


def ropes_of(config: Any) -> list[dict[str, Any]]:
    """Rotary settings: one table, or one for each type of layer."""
    table = getattr(config, "rope_parameters", None) or {}
    tables = [table, *(value for value in table.values() if isinstance(value, dict))]
    return [found for found in tables if "rope_type" in found]


def cut_layers(config: Any, keep: Sequence[int]) -> Any:
    """A copy of a config with these layers alone; whatever it lists for each layer is cut with them."""
    count, cut = config.num_hidden_layers, copy.deepcopy(config)
    for name, values in per_layer(config, count):
        setattr(cut, name, type(values)(values[layer] for layer in keep))
    cut.num_hidden_layers = len(keep)
    keep_experts(config, cut, keep)
    return cut


def check_cut(config: Any, keep: Sequence[int]) -> Any:
    """`cut_layers` of a config, refused where a layer would be built otherwise than the one that it was.

    Raises:
        UserError: names the layer.
    """
    cut = cut_layers(config, keep)
    if names_experts(config):  # nothing else decides a layer's weights by its number
        full = skeleton(config)
        refuse_other_layers(full, skeleton(cut), blocks_name(full), keep)
    return cut


def per_layer(config: Any, count: int) -> Iterator[tuple[str, list[Any] | tuple[Any, ...]]]:
    """What a config lists for each of its layers, by the field's name."""
    for name, values in vars(config).items():
        listed = isinstance(values, list | tuple) and len(values) == count and not name.startswith("_")
        if listed and name not in ("architectures", "mlp_only_layers", "moe_layers"):  # the last two list layers by number
            yield name, values


def with_weights(model: Model, config: Any, weights: dict[str, Any]) -> Model:
    """A model of the same class and of another config, holding these weights; nothing is shared with the first."""
    import torch

    config.tie_word_embeddings = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.device("meta"):
        made = type(model)(config)
    made.load_state_dict(weights, strict=False, assign=True)
    made.tie_weights()
    stored = made.state_dict().keys()
    for name, _ in list(made.named_buffers()):  # rotary frequencies, which no state holds, and the few that one does
        owner, _, last = name.rpartition(".")
        value = weights[name] if name in weights else model.get_buffer(name).clone()
        made.get_submodule(owner).register_buffer(last, value, persistent=name in stored)
    left = [name for name, tensor in [*made.named_parameters(), *made.named_buffers()] if tensor.is_meta]
    assert not left, f"no weights for {left}"
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.train(model.training)


def stored_dtype(where: str, *, rest: bool = False) -> Any:
    """The torch dtype of a folder's weights: what all of them share, else float32; of a hub name what its config says.

    Args:
        rest: of a four-bit model those alone that were not quantised.

    Raises:
        UserError: as `weight_files`.
    """
    import torch

    if gguf_of(where) is not None:
        return torch.float32  # which alone holds decoded weights exactly
    folder = folder_of(where)
    if folder is None:
        return getattr(config_of(where), "dtype", None)
    known = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    packed = folder / PACKED
    codes = {name.rpartition(".")[0] for name in header_of(packed)} if rest and packed.is_file() else set()
    entries = [item for file in weight_files(folder) for item in header_of(file).items()]
    stored = {entry["dtype"] for name, entry in entries if name.removesuffix(".weight") not in codes}
    return known.get(stored.pop(), torch.float32) if len(stored) == 1 else torch.float32


def load_stored(where: str) -> Model:
    """`load_model`, its parameters in the dtype in which they are stored, where that holds each exactly; else in float32."""
    model, dtype = load_model(where), stored_dtype(where)
    if dtype is not None and all(bool((p == p.to(dtype).to(p.dtype)).all()) for p in model.parameters()):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model


def as_dtype(model: Model, dtype: Any) -> Model:
    """The model itself where it has this dtype, else a copy of it in this dtype.

    Raises:
        UserError: a weight is too large or too small for the dtype.
    """
    if all(parameter.dtype == dtype for parameter in model.parameters()):
        return model
    cast = copy.deepcopy(model).to(dtype)
    for (name, stored), own in zip(cast.named_parameters(), model.parameters(), strict=True):
        _refuse_lost(name, own.detach(), stored.detach())
    return cast


def _refuse_lost(name: str, own: Any, stored: Any) -> None:
    """Refuse a cast that overflowed or flushed to zero."""
    values, lost = own.double(), stored.double() - own.double()
    if not lost.isfinite().all() or lost.norm() > 0.05 * values.norm():
        size = "large" if stored.isinf().any() else "small"
        raise UserError(f"the weight '{name}' is too {size} for {str(stored.dtype).removeprefix('torch.')}; use float32")


def skeleton(config: Any) -> Model:
    """The modules of a model of this config, with shapes and without weights."""
    import torch

    with torch.device("meta"):
        return library().AutoModelForCausalLM.from_config(config)


def save_model(model: Model, tokenizer: Tokenizer, folder: Path, stop_ids: list[int] | None = None, dtype: Any = None) -> None:
    """As any Hub model is saved: config, safetensors, tokenizer with its chat template; weights in `dtype`, default: theirs.

    With `stop_ids` plain transformers' `generate` stops where the model was trained to, and is greedy: what a checkpoint
    brought along (sampling, a repetition penalty, another end) was not what it was measured with.
    """
    transformers = library()
    if stop_ids is not None:
        model.generation_config = transformers.GenerationConfig(
            eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, do_sample=False
        )
    (model if dtype is None else as_dtype(model, dtype)).save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))


def save_dequantised(
    model: Model, tokenizer: Tokenizer, folder: Path, stop_ids: list[int], quantised: Container[str], rest: Any, exact: bool
) -> None:
    """`save_model`, `quantised` parameters in float32, which alone holds them exactly, the others in the dtype `rest`.

    config.json names float32, in which programs then load the model.

    Args:
        exact: whether a parameter that `rest` would round stays as it is.

    Raises:
        UserError: a weight is too large or too small for the dtype.
    """
    for name, parameter in model.named_parameters():
        if name in quantised:
            continue
        cast = parameter.data.to(rest)
        if not exact:
            _refuse_lost(name, parameter.data, cast)
        if not exact or cast.to(parameter.dtype).equal(parameter.data):
            parameter.data = cast
    save_model(model, tokenizer, folder, stop_ids)
    write_json(folder / "config.json", read_json(folder / "config.json") | {"dtype": "float32"})


def blocks_of(model: Model) -> list[Any]:
    """The decoder layers, in order.

    Raises:
        UserError: their place in the model is unknown.
    """
    return list(model.get_submodule(blocks_name(model)))


def states_of(output: Any) -> Any:
    """The hidden states of what a decoder layer gives: some families wrap them in a tuple (Bloom, Falcon-H1)."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def recomputed(model: Model, wanted: bool = True) -> Iterator[None]:
    """While inside, decoder layers keep their inputs alone for the way back and run again there: exact, dropout included.

    Chen et al., arXiv:1604.06174.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    def again(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            keeps = torch.is_grad_enabled()
            return checkpoint(forward, *args, use_reentrant=False, **kwargs) if keeps else forward(*args, **kwargs)

        return run

    blocks = blocks_of(model) if wanted else []
    for block in blocks:
        block.forward = again(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def blocks_name(model: Model) -> str:
    """Where the decoder layers are, such as `model.layers`: the one list of as many modules as the config counts layers.

    Raises:
        UserError: there is none, or more than one.
    """
    from torch import nn

    count = model.config.num_hidden_layers
    found = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outer) != 1:
        raise UserError(
            f"the decoder layers of a {type(model).__name__} cannot be distinguished from its other parts; choose another model"
        )
    return outer[0]


def linears_in(module: Any) -> dict[str, Any]:
    """Linear layers by name: torch's, and GPT-2's, whose weight is stored [in, out]."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return {name: inner for name, inner in module.named_modules() if isinstance(inner, nn.Linear | Conv1D)}


def matrices_in(model: Model) -> dict[str, Any]:
    """A model's linear layers, its head among them, and its token embedding, by name."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    return {name: embedding, **linears_in(model)}


@dataclass(frozen=True)
class Size:
    """Parameters of a model, by what they cost.

    Attributes:
        body: in the transformer's layers.
        embedding: in the token embedding (and learned positions).
        head: in the output head, 0 when it shares the embedding's matrix.
        idle: of the body, in experts that a token does not pass through; it passes through the other ones.
        hidden: width of the final hidden state.
        vocab: rows of the output head.
    """

    body: int
    embedding: int
    head: int
    hidden: int
    vocab: int
    idle: int = 0

    @property
    def parameters(self) -> int:
        return self.body + self.embedding + self.head

    @property
    def active(self) -> int:
        """Of the body, what each token passes through: all of it but for mixtures of experts."""
        return self.body - self.idle


def size_of(config: Any) -> Size:
    """Count a model's parameters from its config, without allocating them."""
    import torch

    with torch.device("meta"):
        model = library().AutoModelForCausalLM.from_config(config)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    tied = head is embedding or config.tie_word_embeddings
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    if tied and head is not embedding:
        total -= head.numel()
    head_count = 0 if tied else head.numel()
    positions = sum(p.numel() for name, p in model.named_parameters() if name.endswith("wpe.weight"))
    in_embedding = embedding.numel() + positions
    body = total - in_embedding - head_count
    return Size(body, in_embedding, head_count, head.shape[1], head.shape[0], idle_parameters(model))
