"""The one-file format of llama.cpp and the programs built on it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from potstill.core.errors import UserError
from potstill.exporters import Exporter

BLOCK = 32  # weights in a block of Q4_0

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a tokenizer cuts text before merging -> llama.cpp's name for it. llama.cpp holds the expressions themselves, and
# takes a wrong name without a word, so a tokenizer is exported only where its own expression is one of these.
PRE_TOKENIZERS = {
    ("split", _CONTRACTIONS + r"\p{N}" + _REST): "qwen2",
    ("split", _CONTRACTIONS + r"\p{N}{1,3}" + _REST): "llama-bpe",
    ("bytes", ""): "gpt-2",
    ("digits", ""): "smollm",
}


class Gguf(Exporter, kind="gguf"):
    """Writes `model-f16.gguf`, and `model-q4_0.gguf` when the model was quantised.

    The q4_0 file repacks the solver's codes and scales bit for bit and quantises nothing anew; layers that were kept
    at full precision stand in it as f16. Norms and biases are f32 in every file. Qwen2, Llama and GPT-2.
    """

    types: Literal["auto"] | tuple[Literal["f32", "f16", "q4_0"], ...] = "auto"
    embeddings: Literal["f16", "q8_0"] = "f16"  # of the q4_0 file: embeddings and head
    name: str = ""  # general.name; the model's own when empty

    def write(self, model: Any, tokenizer: Any, packed: Any, folder: Path) -> list[Path]:
        types = (("f16", "q4_0") if packed else ("f16",)) if self.types == "auto" else self.types
        if "q4_0" in types and not packed:
            raise UserError("the gguf exporter's types name 'q4_0' but the model is not quantised; quantise it, or drop 'q4_0'")
        ends = model.generation_config.eos_token_id  # potstill saves the end of turn first
        end_of_turn = ends[0] if isinstance(ends, list) else ends
        rows = len(model.get_input_embeddings().weight)
        metadata = model_metadata(model, self.name) + tokenizer_metadata(tokenizer, rows, end_of_turn)
        return [self._write_file(model, packed, type, metadata, folder / f"model-{type}.gguf") for type in types]

    def _write_file(self, model: Any, packed: Any, type: str, metadata: list["Entry"], path: Path) -> Path:
        from gguf import GGUFWriter

        writer = GGUFWriter(path, model.config.model_type)
        for add, value in metadata:
            getattr(writer, f"add_{add}")(value)
        writer.add_file_type({"f32": 0, "f16": 1, "q4_0": 2}[type])
        writer.add_quantization_version(2)
        for name, bytes_or_floats, raw_type in tensors(model, packed if type == "q4_0" else {}, type, self.embeddings):
            writer.add_tensor(name, bytes_or_floats, raw_dtype=raw_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


Entry = tuple[str, Any]  # GGUFWriter's method without its `add_`, and the value


def model_metadata(model: Any, name: str) -> list[Entry]:
    """Hyper-parameters that llama.cpp builds the network from.

    Raises:
        UserError: the network is not one that llama.cpp would compute alike.
    """
    config = model.config
    match config.model_type:
        case "qwen2" | "llama":
            own = _llama_metadata(config)
        case "gpt2":
            own = _gpt2_metadata(config)
        case other:
            raise UserError(f"the gguf exporter knows qwen2, llama and gpt2, not '{other}'; export 'safetensors' instead")
    return [
        ("name", name or Path(config._name_or_path or config.model_type).name),
        ("vocab_size", len(model.get_input_embeddings().weight)),
        ("embedding_length", config.hidden_size),
        ("block_count", config.num_hidden_layers),
        ("context_length", config.max_position_embeddings),
        ("head_count", config.num_attention_heads),
        *own,
    ]


def _llama_metadata(config: Any) -> list[Entry]:
    rope = config.rope_parameters
    _must(rope.get("rope_type", "default") == "default", f"rotary embeddings of type '{rope.get('rope_type')}'")
    _must(config.hidden_act == "silu", f"the activation '{config.hidden_act}'")
    _must("sliding_attention" not in (getattr(config, "layer_types", None) or ()), "sliding-window attention")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [
        ("feed_forward_length", config.intermediate_size),
        ("head_count_kv", config.num_key_value_heads),
        ("layer_norm_rms_eps", config.rms_norm_eps),
        ("rope_freq_base", float(rope["rope_theta"])),
        ("rope_dimension_count", head_dim),
        ("key_length", head_dim),
        ("value_length", head_dim),
    ]


def _gpt2_metadata(config: Any) -> list[Entry]:
    _must(config.activation_function == "gelu_new", f"the activation '{config.activation_function}'")
    _must(config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx, "attention scaled in another way")
    return [
        ("feed_forward_length", config.n_inner or 4 * config.n_embd),
        ("head_count_kv", config.n_head),
        ("layer_norm_eps", config.layer_norm_epsilon),
    ]


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise UserError(f"the gguf exporter cannot express {what}; export 'safetensors' instead")


def tokenizer_metadata(tokenizer: Any, rows: int, end_of_turn: int | None = None) -> list[Entry]:
    """Vocabulary, merges and special tokens, the vocabulary padded to the model's `rows` with unused entries.

    `end_of_turn` is the token that ends an answer, where that is not the end of sequence.

    Raises:
        UserError: not a byte-level BPE that llama.cpp cuts alike, more tokens than rows, or no end-of-sequence token.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if getattr(tokenizer, "is_fast", False) else {}
    pre = _pre_tokenizer(backend)
    tokens, token_types = _tokens(tokenizer, rows)
    if tokenizer.eos_token_id is None:
        raise UserError("the gguf exporter needs the tokenizer to have an end-of-sequence token; set tokenizer.eos_token")
    entries: list[Entry] = [
        ("tokenizer_model", "gpt2"),
        ("tokenizer_pre", pre),
        ("token_list", tokens),
        ("token_types", token_types),
        ("token_merges", [pair if isinstance(pair, str) else " ".join(pair) for pair in backend["model"]["merges"]]),
        ("eos_token_id", tokenizer.eos_token_id),
        *([("eot_token_id", end_of_turn)] if end_of_turn not in (None, tokenizer.eos_token_id) else []),
        ("add_bos_token", tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id),
    ]
    if tokenizer.bos_token_id is not None:
        entries.append(("bos_token_id", tokenizer.bos_token_id))
    if tokenizer.pad_token_id is not None:
        entries.append(("pad_token_id", tokenizer.pad_token_id))
    if tokenizer.chat_template:
        entries.append(("chat_template", tokenizer.get_chat_template()))
    return entries


def _pre_tokenizer(backend: dict[str, Any]) -> str:
    """llama.cpp's name for the way this tokenizer cuts text, read off its own description."""
    if backend.get("model", {}).get("type") != "BPE" or backend["model"].get("byte_fallback"):
        raise UserError("the gguf exporter knows byte-level BPE tokenizers, not SentencePiece; export 'safetensors' instead")
    outer = backend["pre_tokenizer"] or {}
    match outer.get("pretokenizers", [outer]):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            cut = ("bytes", "")
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            cut = ("digits", "")
        case [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            cut = ("split", regex)
        case _:
            cut = None
    pre = PRE_TOKENIZERS.get(cut) if cut else None
    # llama.cpp takes whole words from the vocabulary before merging under this one name, and under no other.
    whole_words = bool(backend["model"].get("ignore_merges"))
    normaliser = (backend["normalizer"] or {"type": "NFC"})["type"]
    if pre is None or whole_words != (pre == "llama-bpe") or normaliser != "NFC":
        known = ", ".join(sorted(PRE_TOKENIZERS.values()))
        raise UserError(
            f"the gguf exporter does not recognise how this tokenizer cuts text (known: {known}), and a wrong guess would "
            "change its tokens silently; export 'safetensors' instead"
        )
    return pre


def _tokens(tokenizer: Any, rows: int) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(vocabulary) >= rows:
        raise UserError(
            f"the tokenizer has token {max(vocabulary)}, but the model's embeddings have {rows} rows; "
            "resize the embeddings to the tokenizer before training"
        )
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for index in range(rows):
        tokens.append(vocabulary.get(index, f"[PAD{index}]"))
        if index not in vocabulary:
            types.append(TokenType.UNUSED)
        elif index in added:
            types.append(TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL)
    return tokens, types


def tensors(model: Any, packed: Any, type: str, embeddings: str) -> list[tuple[str, Any, Any]]:
    """Every parameter under llama.cpp's name, as (name, array, raw type)."""
    import numpy as np
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map
    from gguf.quants import quantize

    config = model.config
    architecture = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}[config.model_type]
    assert architecture in (MODEL_ARCH.QWEN2, MODEL_ARCH.LLAMA, MODEL_ARCH.GPT2)
    renamed = get_tensor_name_map(architecture, config.num_hidden_layers)
    input_outputs = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    transposed = {f"{name}.weight" for name, module in model.named_modules() if module.__class__.__name__ == "Conv1D"}
    written = []
    for name, parameter in model.named_parameters():  # names a tied head once, as the embedding: llama.cpp ties it again
        new_name = renamed.get_name(name, try_suffixes=(".weight", ".bias"))
        if new_name is None:
            raise UserError(f"the gguf exporter has no place for the tensor '{name}'; export 'safetensors' instead")
        rows = _row_order(name, config)
        matrix = packed.get(name.removesuffix(".weight"))
        if matrix is not None:
            written.append((new_name, rows(q4_0_bytes(matrix, name)), GGMLQuantizationType.Q4_0))
            continue
        values = rows((parameter.T if name in transposed else parameter).detach().float().cpu().contiguous().numpy())
        is_embedding = any(parameter is weight for weight in input_outputs)
        if type == "f32" or values.ndim == 1 or new_name.startswith("position_embd"):
            written.append((new_name, values, GGMLQuantizationType.F32))
        elif is_embedding and type == "q4_0" and embeddings == "q8_0":
            if values.shape[1] % BLOCK:
                raise UserError(f"embeddings = 'q8_0' needs a width divisible by {BLOCK}, not {values.shape[1]}; use 'f16'")
            written.append((new_name, quantize(values, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0))
        else:
            if np.abs(values).max() > np.finfo(np.float16).max:
                raise UserError(f"the tensor '{name}' is too large for float16; set types = ['f32']")
            written.append((new_name, values.astype(np.float16), GGMLQuantizationType.F16))
    return written


def _row_order(name: str, config: Any) -> Callable[[Any], Any]:
    """How the rows of this tensor are reordered: Llama's q and k from halves to pairs, all else as it stands.

    transformers rotates entry i of a head with entry i + d/2; llama.cpp's Llama, 2i with 2i + 1.
    """
    import numpy as np

    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", None)}
    layer = name.split(".")[-2]
    if config.model_type != "llama" or layer not in heads:
        return lambda array: array

    def reorder(array: Any) -> Any:
        order = np.arange(len(array)).reshape(heads[layer], 2, -1).swapaxes(1, 2).reshape(-1)
        return np.ascontiguousarray(array[order])

    return reorder


def q4_0_bytes(matrix: Any, name: str) -> Any:
    """A `quant.Packed` as the bytes of Q4_0, uint8 [out, in / 32 · 18].

    A block of 32 weights is its scale d in float16, then 16 bytes: byte j holds element j in its low nibble and j + 16
    in its high one, each stored as code + 8. Weight = d · code. A group wider than a block repeats its scale.
    """
    import numpy as np

    if matrix.group % BLOCK:
        raise UserError(f"Q4_0 stores groups of {BLOCK}, and '{name}' has {matrix.group}; quantise with group = {BLOCK}")
    outputs, inputs = matrix.codes_OI.shape
    stored_OBK = (matrix.codes_OI.cpu().numpy() + 8).astype(np.uint8).reshape(outputs, inputs // BLOCK, BLOCK)
    nibbles_OBJ = stored_OBK[..., : BLOCK // 2] | (stored_OBK[..., BLOCK // 2 :] << 4)
    scales_OB = np.repeat(matrix.scales_OG.cpu().numpy().astype("<f2"), matrix.group // BLOCK, axis=1)
    scales_OBJ = scales_OB[..., None].view(np.uint8)
    return np.concatenate([scales_OBJ, nibbles_OBJ], axis=-1).reshape(outputs, -1)
