"""Models as llama.cpp, Ollama and LM Studio keep them: one GGUF file, read as a config, weights and a tokenizer.

The file's own keys say everything. A key, tensor, type or name that is not known here is refused by name, because whatever is
passed over in silence makes another model of it. The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from potstill.core.errors import UserError
from potstill.edges.hub import library
from potstill.edges.weights import Stored

Order = Callable[[Any], Any]  # a tensor as transformers has it, from the file's

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class Tensor:
    """A tensor as the file's header describes it.

    Attributes:
        shape: outermost dimension first, as torch has it.
        type: ggml's number of its encoding.
        offset: of its first byte in the file.
    """

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class Gguf:
    """The header of a GGUF file.

    Attributes:
        where: the file as the user named it, for messages.
    """

    where: str
    path: Path
    keys: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        return str(self.keys.get("general.architecture", ""))

    @cached_property
    def own(self) -> dict[str, Any]:
        """Hyper-parameters, without the architecture's name before each."""
        begin = f"{self.architecture}."
        return {key.removeprefix(begin): value for key, value in self.keys.items() if key.startswith(begin)}

    def refuse(self, why: str) -> UserError:
        return UserError(f"{self.where}: {why}")


_READ: dict[tuple[str, int, int], Gguf] = {}  # by path, size and time: vocabularies take a second to read


def read(where: str, path: Path) -> Gguf:
    """The header of a file, checked against the file's length.

    Raises:
        UserError: not a GGUF file, truncated, one of several parts, or of an unknown version or encoding.
    """
    stat = path.stat()
    known = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if known not in _READ:
        _READ[known] = _read(where, path, stat.st_size)
    return _READ[known]


def _read(where: str, path: Path, size: int) -> Gguf:
    again = "copy or download it again"
    if _SPLIT.search(path.name):
        raise UserError(
            f"{where}: one part of a model in several files; join them with llama.cpp's `llama-gguf-split --merge`, and name "
            "the joined file"
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{where}: not a GGUF file (it does not begin with GGUF); {again}")
        try:
            version, tensors, keys = struct.unpack("<IQQ", file.read(20))
            if version not in (2, 3):
                raise UserError(f"{where}: GGUF version {version} is not known (2 and 3 are); convert the model again")
            found = dict(_key(file) for _ in range(keys))
            infos = [_info(file) for _ in range(tensors)]
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError, KeyError) as error:
            raise UserError(f"{where}: truncated or damaged in its header ({size:,} bytes); {again}") from error
        begin = -(-file.tell() // (alignment := int(found.get("general.alignment", 32)))) * alignment
    if found.get("split.count", 0) > 1:
        raise UserError(
            f"{where}: one part of a model in {found['split.count']} files; join them with llama-gguf-split --merge"
        )
    placed = {name: Tensor(shape, type, begin + offset) for name, shape, type, offset in infos}
    whole = Gguf(where, path, found, placed)
    expected = max((tensor.offset + _bytes(whole, name) for name, tensor in placed.items()), default=begin)
    if size < expected:
        raise UserError(f"{where}: truncated, {size:,} of {expected:,} bytes; {again}")
    return whole


def _number(file: BinaryIO, form: str) -> Any:
    (value,) = struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))
    return value


def _text(file: BinaryIO) -> str:
    length = _number(file, "Q")
    data = file.read(length) if length < 2**31 else b""
    if len(data) < length:
        raise struct.error("text ends early")
    return data.decode("utf-8", "surrogateescape")


def _key(file: BinaryIO) -> tuple[str, Any]:
    name = _text(file)
    return name, _value(file, _number(file, "I"))


def _value(file: BinaryIO, type: int) -> Any:
    if type == _STRING:
        return _text(file)
    if type != _ARRAY:
        return _number(file, _SCALARS[type])
    inner, count = _number(file, "I"), _number(file, "Q")
    if inner in (_STRING, _ARRAY):
        return [_value(file, inner) for _ in range(count)]
    form = f"<{count}{_SCALARS[inner]}"
    return list(struct.unpack(form, file.read(struct.calcsize(form))))


def _info(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name = _text(file)
    shape = tuple(_number(file, "Q") for _ in range(_number(file, "I")))
    return name, shape[::-1], _number(file, "I"), _number(file, "Q")


def _bytes(file: Gguf, name: str) -> int:
    """Bytes of a tensor in the file.

    Raises:
        UserError: its encoding is not known.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    tensor = file.tensors[name]
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type)]
    except (ValueError, KeyError):
        raise file.refuse(f"'{name}' is stored in an encoding that is not known here (ggml type {tensor.type})") from None
    if tensor.shape and tensor.shape[-1] % block:
        raise file.refuse(f"'{name}' has rows of {tensor.shape[-1]}, and its encoding blocks of {block}; download it again")
    return math.prod(tensor.shape) // block * size


def values(file: Gguf, name: str) -> Any:
    """A tensor as float32, its codes multiplied out as ggml does.

    Raises:
        UserError: the `gguf` package cannot decode its encoding.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize

    tensor = file.tensors[name]
    type = GGMLQuantizationType(tensor.type)
    raw = np.memmap(file.path, np.uint8, "r", tensor.offset, (_bytes(file, name),))
    plain = {"F64": np.float64, "F32": np.float32, "F16": np.float16}.get(type.name)
    if plain is not None:
        return raw.view(plain).reshape(tensor.shape).astype(np.float32)
    try:
        rows = raw.reshape(*tensor.shape[:-1], -1)
        return np.ascontiguousarray(dequantize(rows, type), dtype=np.float32).reshape(tensor.shape)
    except NotImplementedError:
        raise file.refuse(
            f"'{name}' is stored as {type.name}, which cannot be decoded here; take a file of another type"
        ) from None


# --- the network


@dataclass(frozen=True)
class _Architecture:
    """How one of llama.cpp's networks is called and built in transformers.

    Attributes:
        keys: its own hyper-parameters, by llama.cpp's name; all others are refused.
        config: the transformers config of a file.
        pairs: whether rotated entries of q and k stand in pairs in the file, and in halves in transformers.
    """

    keys: frozenset[str]
    config: Callable[[Gguf], Any]
    pairs: bool = False


_COUNTS = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv",
}  # fmt: skip
_ROTARY = {
    "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length", "rope.freq_base",
    "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.finetuned",
}  # fmt: skip
_WINDOWS = {
    "attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa", "final_logit_softcapping",
}  # fmt: skip
_NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "attention.sliding_window": 0, "attention.causal": True}  # these values


def config_of(file: Gguf) -> Any:
    """The transformers config of a file.

    Raises:
        UserError: a network that is not known here, or a key of it that is not.
    """
    known = _ARCHITECTURES.get(file.architecture)
    if known is None:
        raise file.refuse(
            f"the architecture '{file.architecture}' is not read from GGUF files (known: {', '.join(sorted(_ARCHITECTURES))}); "
            "name the model's transformers folder or hub name instead"
        )
    for key, value in file.own.items():
        if key not in known.keys and not (key in _NEUTRAL and value == _NEUTRAL[key]):
            shown = f" = {value}" if isinstance(value, int | float | str) else ""
            raise file.refuse(
                f"its key '{file.architecture}.{key}'{shown} is not known here, and without it this would be another model; "
                "name the model's transformers folder or hub name instead"
            )
    config = known.config(file)
    ends = [file.keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eos", "eom")]
    found = list(dict.fromkeys(end for end in ends if end is not None))
    config.eos_token_id = found[0] if len(found) == 1 else found or None
    config.bos_token_id = file.keys.get("tokenizer.ggml.bos_token_id")
    config.pad_token_id = file.keys.get("tokenizer.ggml.padding_token_id")
    config._name_or_path = file.where
    return config


def _whole(file: Gguf, key: str, default: int | None = None) -> int:
    """A key that must be one whole number."""
    value = file.own.get(key, default)
    if not isinstance(value, int):
        what = "lacks" if value is None else "has a value for each layer in"
        raise file.refuse(f"it {what} '{file.architecture}.{key}'; convert the model again")
    return value


def _rows(file: Gguf) -> int:
    """Of the embedding: the vocabulary with its padding."""
    if "token_embd.weight" not in file.tensors:
        raise file.refuse("it holds no token embeddings (token_embd.weight), so it is no language model")
    return file.tensors["token_embd.weight"].shape[0]


def _shape(file: Gguf) -> dict[str, Any]:
    heads = _whole(file, "attention.head_count")
    width = _whole(file, "attention.key_length", _whole(file, "embedding_length") // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _whole(file, key, width) != width:
            raise file.refuse(f"its {key} is {file.own[key]} and its heads are {width} wide, which is not read here")
    return {
        "vocab_size": _rows(file),
        "hidden_size": _whole(file, "embedding_length"),
        "intermediate_size": _whole(file, "feed_forward_length"),
        "num_hidden_layers": _whole(file, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _whole(file, "attention.head_count_kv", heads),
        "head_dim": width,
        "max_position_embeddings": _whole(file, "context_length"),
        "rms_norm_eps": _epsilon(file, "attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope(file, width),
    }


def _epsilon(file: Gguf, key: str) -> float:
    if key not in file.own:
        raise file.refuse(f"it lacks '{file.architecture}.{key}'; convert the model again")
    return _short(file.own[key])


def _short(value: float) -> float:
    """The shortest decimal that is this float32: 1e-06 and not 9.999999974752427e-07."""
    import numpy as np

    return float(str(np.float32(value)))


def _rope(file: Gguf, width: int) -> dict[str, Any]:
    """Rotary settings; llama.cpp's defaults where the file names none."""
    base = {"rope_theta": _short(file.own.get("rope.freq_base", 10_000.0))}
    scaling = str(file.own.get("rope.scaling.type", "none"))
    if ROPE_FREQS in file.tensors:
        if scaling != "none":
            raise file.refuse(f"it has both rope.scaling.type = '{scaling}' and {ROPE_FREQS}, which is not read here")
        return {"rope_type": "llama3", **base, **_llama3(file, base["rope_theta"], width)}
    factor = _short(file.own.get("rope.scaling.factor", 1.0))
    match scaling:
        case "none":
            return {"rope_type": "default", **base}
        case "linear":
            return {"rope_type": "linear", **base, "factor": factor}
        case "yarn":
            own = file.own
            attention = own.get("rope.scaling.attn_factor", 1.0) * (1 + 0.1 * math.log(factor))
            return {
                "rope_type": "yarn",
                **base,
                "factor": factor,
                "original_max_position_embeddings": _whole(file, "rope.scaling.original_context_length"),
                "attention_factor": attention,
                "beta_fast": _short(own.get("rope.scaling.yarn_beta_fast", 32.0)),
                "beta_slow": _short(own.get("rope.scaling.yarn_beta_slow", 1.0)),
            }
    raise file.refuse(f"rotary embeddings of type '{scaling}' are not read from GGUF files")


def _llama3(file: Gguf, theta: float, width: int) -> dict[str, Any]:
    """The settings of Llama 3.1's stretched positions, from what the file divides each frequency by.

    1 where the wavelength is below original / high, `factor` above original / low, and between 1 / ((1 − s) / factor + s) with
    s = (original · frequency / 2π − low) / (high − low). Only original / low and original / high can be told from them.

    Raises:
        UserError: they are not of that form.
    """
    import numpy as np

    divisors = values(file, ROPE_FREQS).astype(np.float64)
    frequency = 1 / theta ** (np.arange(0, width, 2) / width)
    factor = _short(divisors.max())
    if len(divisors) == len(frequency) and factor > 1:
        for original, low, high in _bands(divisors, frequency, factor):
            smooth = ((original * frequency / (2 * np.pi) - low) / (high - low)).clip(0, 1)
            if np.allclose(1 / ((1 - smooth) / factor + smooth), divisors, rtol=1e-5):
                names = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
                return dict(zip(names, (factor, original, low, high), strict=True))
    raise file.refuse(f"its {ROPE_FREQS} stretches positions in a way that is not known here")


def _bands(divisors: Any, frequency: Any, factor: float) -> Iterator[tuple[int, float, float]]:
    """Settings that the divisors may come from: those of Meta's models, then the line through the rising part."""
    import numpy as np

    for original in (8192, 4096, 2048, 1024, 512, 256, 128, 64, 32):
        yield original, 1.0, 4.0
    smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    rising = (smooth > 1e-6) & (smooth < 1 - 1e-6)
    if rising.sum() >= 2:
        slope, height = np.polyfit(frequency[rising], smooth[rising], 1)
        low = 1.0
        high = low + low / -height if height < 0 else math.inf
        original = 2 * math.pi * slope * (high - low)
        if math.isfinite(original) and original > 1:
            yield round(original), low * round(original) / original, high * round(original) / original


def _llama(file: Gguf) -> Any:
    """Llama and what llama.cpp builds as Llama: biases of q, k and v alone are Qwen2's, of all four Llama's own."""
    of_qkv, of_output, of_mlp = (f"blk.0.{name}.bias" in file.tensors for name in ("attn_q", "attn_output", "ffn_gate"))
    if of_qkv and not of_output:
        return _qwen2(file)
    return library().LlamaConfig(**_shape(file), attention_bias=of_qkv, mlp_bias=of_mlp)


def _qwen2(file: Gguf) -> Any:
    return library().Qwen2Config(**_shape(file), use_sliding_window=False)


def _qwen3(file: Gguf) -> Any:
    return library().Qwen3Config(**_shape(file), use_sliding_window=False)


def _smollm3(file: Gguf) -> Any:
    """Every fourth layer has no rotary embeddings: llama.cpp does not ask the file."""
    return library().SmolLM3Config(**_shape(file), no_rope_layer_interval=4, use_sliding_window=False)


def _gemma3(file: Gguf) -> Any:
    """Gemma 3, text alone. llama.cpp divides scores by the root of a head's width, in the 27B by that of heads side by side."""
    shape, own = _shape(file), file.own
    layers, window = shape["num_hidden_layers"], own.get("attention.sliding_window", 0)
    full, theta = shape.pop("rope_parameters"), _short(own.get("rope.freq_base_swa", 10_000.0))
    beside = shape["hidden_size"] // shape["num_attention_heads"]
    softcap = own.get("final_logit_softcapping")
    return library().Gemma3TextConfig(
        **shape,
        layer_types=["sliding_attention" if slides else "full_attention" for slides in _sliding(file, layers, window)],
        sliding_window=window or shape["max_position_embeddings"],
        rope_parameters={"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": theta}},
        query_pre_attn_scalar=beside if layers == _GEMMA_27B else shape["head_dim"],
        final_logit_softcapping=_short(softcap) if softcap else None,
    )


def _sliding(file: Gguf, layers: int, window: int) -> list[bool]:
    """Which layers see a window alone: as the file says, else all but each sixth."""
    pattern = file.own.get("attention.sliding_window_pattern", 6)
    if not window:
        return [False] * layers
    if isinstance(pattern, int):
        return [layer % pattern < pattern - 1 for layer in range(layers)]
    if len(pattern) < layers:
        raise file.refuse(
            f"its attention.sliding_window_pattern names {len(pattern)} of {layers} layers; convert the model again"
        )
    return [bool(slides) for slides in pattern[:layers]]


_GEMMA_27B = 62  # layers


def _gpt2(file: Gguf) -> Any:
    heads = _whole(file, "attention.head_count")
    if _whole(file, "attention.head_count_kv", heads) != heads:
        raise file.refuse("its heads share keys, which GPT-2's do not")
    return library().GPT2Config(
        vocab_size=_rows(file),
        n_positions=_whole(file, "context_length"),
        n_embd=_whole(file, "embedding_length"),
        n_layer=_whole(file, "block_count"),
        n_head=heads,
        n_inner=_whole(file, "feed_forward_length"),
        layer_norm_epsilon=_epsilon(file, "attention.layer_norm_epsilon"),
        tie_word_embeddings="output.weight" not in file.tensors,
    )


_ARCHITECTURES = {
    "llama": _Architecture(frozenset(_COUNTS | _ROTARY), _llama, pairs=True),
    "qwen2": _Architecture(frozenset(_COUNTS | _ROTARY), _qwen2),
    "qwen3": _Architecture(frozenset(_COUNTS | _ROTARY), _qwen3),
    "smollm3": _Architecture(frozenset(_COUNTS | _ROTARY), _smollm3, pairs=True),
    "gemma3": _Architecture(frozenset(_COUNTS | _ROTARY | _WINDOWS), _gemma3),
    "gpt2": _Architecture(frozenset(_COUNTS | {"attention.layer_norm_epsilon"}), _gpt2),
}


@dataclass(frozen=True)
class _Decoded(Stored):
    """A tensor of a GGUF file, as transformers has it: float32, in its order of rows."""

    source: Gguf | None = None
    named: str = ""
    order: Order = field(default=lambda array: array)

    def read(self, name: str) -> Any:
        import numpy as np
        import torch

        assert self.source is not None
        return torch.from_numpy(np.ascontiguousarray(self.order(values(self.source, self.named))))


def stored_in(file: Gguf, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """All tensors of a file by transformers' names; one that has no such name keeps its own.

    Args:
        config: what `config_of` gave.
        shapes: of the network's parameters, by transformers' names.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architectures = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    renamed = get_tensor_name_map(architectures[file.architecture], config.num_hidden_layers)
    ours = {renamed.get_name(name, try_suffixes=(".weight", ".bias")): name for name in shapes}
    found: dict[str, Stored] = {}
    for name, tensor in file.tensors.items():
        if name == ROPE_FREQS:  # is in the config
            continue
        own = ours.get(name) or name
        order, turned = _order(file, config, own)
        shape = tensor.shape[::-1] if turned else tensor.shape
        found[own] = _Decoded(file.path, "F32", shape, file, name, order)
    return found


def _order(file: Gguf, config: Any, name: str) -> tuple[Order, bool]:
    """How a tensor becomes transformers' own, and whether its rows become columns."""
    layer = name.split(".")[-2:][0]
    if config.model_type == "gpt2" and layer in ("c_attn", "c_proj", "c_fc") and name.endswith(".weight"):
        return (lambda array: array.T), True
    if config.model_type == "gemma3_text" and layer.endswith("norm"):  # llama.cpp multiplies by what transformers adds to 1
        return (lambda array: array - 1), False
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(layer)
    if heads is None or not _ARCHITECTURES[file.architecture].pairs:
        return (lambda array: array), False
    count = getattr(config, heads)
    return (lambda array: array.reshape(count, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)), False


# --- the tokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class _Cut:
    """How text is cut before it is merged, under one of llama.cpp's names.

    Attributes:
        split: an expression of its own; "" for GPT-2's.
        digits: whether each digit is apart before GPT-2's expression.
        composes: whether the models of that name normalise to NFC; the file does not say, llama.cpp does not do it.
        whole_words: whether a word that is a token is taken as it is, before merging.
        begins: whether texts begin with BOS where the file does not say.
    """

    split: str = ""
    digits: bool = False
    composes: bool = False
    whole_words: bool = False
    begins: bool = False


_QWEN2 = _Cut(_CONTRACTIONS + r"\p{N}" + _REST, composes=True)
_LLAMA3 = _Cut(_CONTRACTIONS + r"\p{N}{1,3}" + _REST, whole_words=True, begins=True)
_CUTS = {
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smollm": _Cut(digits=True),
    "gpt-2": _Cut(),
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # llama.cpp's token types
_GIVEN_BLANKS = -1  # ours: of runs of blanks that SentencePiece was given as tokens
_BLANK = "▁"
_PADDING = re.compile(r"\[+PAD\d+\]+")


def tokenizer_of(file: Gguf) -> Any:
    """The tokenizer of a file, with its chat template.

    Raises:
        UserError: it holds none, or one that cuts text in a way that is not known here.
    """
    from transformers import PreTrainedTokenizerFast

    names, types = _tokens(file)
    special = _special(file, names)
    match kind := file.keys.get("tokenizer.ggml.model"):
        case "gpt2":
            backend, begins = _byte_level(file, names, types)
        case "llama":
            backend, begins = _sentencepiece(file, names, types, special.get("unk_token"))
        case None:
            raise file.refuse("it holds no tokenizer; take a file that has one")
        case _:
            raise file.refuse(
                f"its tokenizer is of llama.cpp's kind '{kind}', and only byte-level BPE ('gpt2') and SentencePiece's BPE "
                "('llama') are read; name the model's transformers folder or hub name instead"
            )
    _add_tokens(backend, names, types)
    _add_ends(file, backend, special, begins=begins)
    if len(names) > _rows(file):
        raise file.refuse(f"it has {len(names):,} tokens and {_rows(file):,} embeddings; download it again")
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special, **_template(file))


def _tokens(file: Gguf) -> tuple[list[str], list[int]]:
    """Names and types by id. Runs of blanks that SentencePiece was given as tokens are written as it writes them."""
    names = _list(file, "tokens")
    types = _list(file, "token_type") if "tokenizer.ggml.token_type" in file.keys else [_NORMAL] * len(names)
    if len(types) != len(names):
        raise file.refuse(f"it has {len(names):,} tokens and {len(types):,} token types; download it again")
    if file.keys.get("tokenizer.ggml.model") == "llama":
        blanks = [type == _USER_DEFINED and not name.strip(" ") for name, type in zip(names, types, strict=True)]
        names = [name.replace(" ", _BLANK) if blank else name for name, blank in zip(names, blanks, strict=True)]
        types = [_GIVEN_BLANKS if blank else type for type, blank in zip(types, blanks, strict=True)]
    return names, types


def _vocabulary(names: list[str], types: list[int]) -> dict[str, int]:
    """Ids by name, without the entries that only fill the embedding's rows."""
    entries = enumerate(zip(names, types, strict=True))
    return {name: id for id, (name, type) in entries if not (type == _UNUSED and _PADDING.fullmatch(name))}


def _byte_level(file: Gguf, names: list[str], types: list[int]) -> tuple[Any, bool]:
    """GPT-2's kind of BPE, and whether texts begin with BOS where the file does not say."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    cut = _cut_of(file)
    merges = [tuple(merge.split(" ", 1)) for merge in _list(file, "merges")]
    try:
        backend = Tokenizer(models.BPE(vocab=_vocabulary(names, types), merges=merges, ignore_merges=cut.whole_words))
    except Exception as error:
        raise file.refuse(f"its tokens and merges do not fit together ({str(error)[:160]}); download it again") from error
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cut.split)
    before = _before(cut)
    backend.pre_tokenizer = pre_tokenizers.Sequence([before, by_bytes]) if before is not None else by_bytes
    backend.decoder = decoders.ByteLevel()
    if cut.composes:
        backend.normalizer = normalizers.NFC()
    return backend, cut.begins


def _sentencepiece(file: Gguf, names: list[str], types: list[int], unknown: str | None) -> tuple[Any, bool]:
    """BPE over text whose blanks are written ▁, with a token for each byte, and whether texts begin with BOS by themselves.

    llama.cpp merges two pieces whenever their joined text is a token, the token of the highest score first and the leftmost of
    these. All ways to make a token of two others, in the order of the tokens' scores, do the same: where one token could be
    made in two places, both hold the same two pieces.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary, scores = _vocabulary(names, types), _list(file, "scores")
    lost = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]
    if lost or len(scores) != len(names):
        what = f"no token for {len(lost)} of 256 bytes" if lost else f"{len(scores):,} scores for {len(names):,} tokens"
        raise file.refuse(f"its tokenizer has {what}; download the file again")
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(file, vocabulary, types, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = bool(file.keys.get("tokenizer.ggml.add_space_prefix", True))
    written = normalizers.Replace(" ", _BLANK)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_BLANK), written]) if prefixed else written
    steps = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return backend, True


def _merges(file: Gguf, vocabulary: Mapping[str, int], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """All ways to make a token of two others, the token of the highest score first.

    Raises:
        UserError: two tokens that could be made have one score, so that the place in a text decides between them.
    """
    plain = {name: id for name, id in vocabulary.items() if types[id] in (_NORMAL, _GIVEN_BLANKS)}
    # given blanks are found in the raw text, so before anything else
    score = {name: math.inf if types[id] == _GIVEN_BLANKS else scores[id] for name, id in plain.items()}
    ways = {
        name: pairs
        for name in plain
        if len(name) > 1
        and (pairs := [(name[:i], name[i:]) for i in range(1, len(name)) if name[:i] in plain and name[i:] in plain])
    }
    shared = {value for value, count in Counter(map(score.__getitem__, ways)).items() if count > 1}
    ways = {name: pairs for name, pairs in ways.items() if score[name] not in shared or _made(name, score)}
    order = sorted(ways, key=lambda name: -score[name])
    tied = (pair for pair in pairwise(order) if score[pair[0]] == score[pair[1]] < math.inf)
    for one, other in tied:
        raise file.refuse(
            f"its tokens {one!r} and {other!r} have one score, so that no rank can say which is merged first; "
            "name the model's transformers folder or hub name instead"
        )
    return [pair for name in order for pair in ways[name]]


def _made(name: str, score: Mapping[str, float]) -> bool:
    """Whether llama.cpp merges a token's own text into that token."""
    pieces = list(name)
    while len(pieces) > 1:
        joined = [left + right for left, right in pairwise(pieces)]
        able = [place for place, text in enumerate(joined) if text in score]
        if not able:
            return False
        place = max(able, key=lambda place: (score[joined[place]], -place))
        pieces[place : place + 2] = [joined[place]]
    return True


def _list(file: Gguf, name: str) -> list[Any]:
    found = file.keys.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list):
        raise file.refuse(f"it holds no tokenizer.ggml.{name}; convert the model again with its tokenizer")
    return found


def _cut_of(file: Gguf) -> _Cut:
    name = file.keys.get("tokenizer.ggml.pre")
    if name in _CUTS:
        return _CUTS[name]
    what = "does not name how its tokenizer cuts text" if name is None else f"names '{name}' for how its tokenizer cuts text"
    raise file.refuse(
        f"it {what} (tokenizer.ggml.pre; known: {', '.join(sorted(_CUTS))}), and a guess would change its tokens silently; "
        "take a file that a newer llama.cpp converted, or the model's transformers folder or hub name"
    )


def _before(cut: _Cut) -> Any:
    """What cuts text before its bytes are written as signs."""
    from tokenizers import Regex, pre_tokenizers

    if cut.split:
        return pre_tokenizers.Split(Regex(cut.split), behavior="isolated")
    return pre_tokenizers.Digits(individual_digits=True) if cut.digits else None


def _add_tokens(backend: Any, names: list[str], types: list[int]) -> None:
    """Tokens that are found in the raw text, before it is cut; each keeps its id, because the vocabulary has it already."""
    from tokenizers import AddedToken

    special = [name for name, type in zip(names, types, strict=True) if type in (_UNKNOWN, _CONTROL)]
    others = [name for name, type in zip(names, types, strict=True) if type == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in others])


def _add_ends(file: Gguf, backend: Any, special: Mapping[str, str], *, begins: bool) -> None:
    """BOS before a text and EOS after it, where the file says so."""
    from tokenizers.processors import TemplateProcessing

    named = {"bos": special.get("bos_token"), "eos": special.get("eos_token")}
    wanted = {
        "bos": file.keys.get("tokenizer.ggml.add_bos_token", begins and named["bos"] is not None),
        "eos": file.keys.get("tokenizer.ggml.add_eos_token", False),
    }
    around = {end: named[end] or "" for end, put in wanted.items() if put}
    lost = next((end for end, name in around.items() if not name), None)
    if lost is not None:
        raise file.refuse(f"it asks for {lost.upper()} around texts and names no such token; convert the model again")
    if around:
        pieces = [name for name in (around.get("bos"), "$A", around.get("eos")) if name]
        ids = [(name, backend.token_to_id(name)) for name in around.values()]
        backend.post_processor = TemplateProcessing(single=pieces, special_tokens=ids)


def _special(file: Gguf, names: list[str]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {token: file.keys.get(f"tokenizer.ggml.{key}_token_id") for token, key in keys.items()}
    wrong = next((token for token, id in found.items() if id is not None and not 0 <= id < len(names)), None)
    if wrong is not None:
        raise file.refuse(f"its {wrong} has id {found[wrong]}, and there are {len(names):,} tokens; convert the model again")
    return {token: names[id] for token, id in found.items() if id is not None}


def _template(file: Gguf) -> dict[str, Any]:
    """The chat template, or all of them by name."""
    default = file.keys.get("tokenizer.chat_template")
    named = {name: file.keys[f"tokenizer.chat_template.{name}"] for name in file.keys.get("tokenizer.chat_templates", ())}
    if named:
        return {"chat_template": ({"default": default} if default is not None else {}) | named}
    return {"chat_template": default} if default is not None else {}
