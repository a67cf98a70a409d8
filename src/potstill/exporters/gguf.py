"""The one-file format of llama.cpp and the programs built on it."""

import errno
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from potstill.core.errors import UserError
from potstill.edges.codes import bits_in
from potstill.exporters import Exporter
from potstill.exporters._ends import end_ids
from potstill.exporters._keys import Keys, write_keys
from potstill.exporters._networks import architecture_of, network_keys, network_problems
from potstill.exporters._tensors import BLOCK, tensors
from potstill.exporters._vocabulary import MOST_ENDS, vocabulary_keys, vocabulary_problems

Type = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}  # llama.cpp's numbers, for people and tools
_PACKED: dict[int, Type] = {4: "q4_0", 8: "q8_0"}  # by bits


class Gguf(Exporter, kind="gguf"):
    """Writes `model-f16.gguf`, or `model-q4_0.gguf` of a quantised model, `model-q8_0.gguf` of one of 8 bits.

    That file repacks the solver's codes and scales bit for bit and quantises nothing again; layers that were kept at
    full precision are f16 in it. Norms and biases are f32 in every file. Other types of a quantised model hold its quantised
    weights too, and say so in their name (`model-q4_0-as-f16.gguf`): for full precision export the model that was quantised.
    q8_0 of a model that is not quantised rounds every matrix as llama.cpp's own quantiser does, f16 where a width does not
    divide by 32.
    Qwen 2 and 3, Llama, Mistral, Gemma 3 (text), SmolLM 3 and GPT-2.
    """

    types: Literal["auto"] | tuple[Type, ...] = Field(
        default="auto", description="of the weights, a file each; auto: q4_0 or q8_0 of a quantised model, else f16"
    )
    embeddings: Literal["f16", "q8_0"] = Field(
        default="f16", description="embeddings and head of a quantised model's file, where they were not quantised with it"
    )
    name: str = Field(default="", description="the model's name in the file; default: recipe and stage, or the base model")

    def problems(self, config: Any, tokenizer: Any, *, quantised: int) -> list[str]:
        types = self.types_of(quantised)
        found = network_problems(config)
        if "q4_0" in types and quantised != 4:
            is_not = f"is quantised to {quantised} bits" if quantised else "is not quantised"
            found.append(f"the gguf exporter's types name 'q4_0' but the model {is_not}; quantise it to 4 bits, or drop 'q4_0'")
        if "q8_0" in types and quantised == 4:
            found.append(
                "the gguf exporter's types name 'q8_0', which would round four-bit weights a second time; export the model "
                "that was quantised, or use 'q4_0'"
            )
        if quantised and self.embeddings == "q8_0" and config.hidden_size % BLOCK:
            found.append(f"embeddings = 'q8_0' needs a width divisible by {BLOCK}, not {config.hidden_size}; use 'f16'")
        return found + vocabulary_problems(tokenizer, config.vocab_size)

    def holds(self, stored: str, *, quantised: int) -> dict[str, str]:
        types = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "q8_0"}
        if quantised:
            types[_PACKED[quantised]] = types[self.embeddings]
        return {_file_name(type, quantised): types.get(type, type) for type in self.types_of(quantised)}

    def write_files(self, model: Any, tokenizer: Any, packed: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
        keys, bits = self.keys(model, tokenizer, name), bits_in(packed)
        return [self.write_file(model, packed, type, keys, folder / _file_name(type, bits)) for type in self.types_of(bits)]

    def keys(self, model: Any, tokenizer: Any, name: str) -> Keys:
        """What a file says of its model besides the weights.

        Raises:
            UserError: answers end at more tokens than a file can name.
        """
        ends = end_ids(model, tokenizer)
        if len(ends) > MOST_ENDS:
            names = ", ".join(tokenizer.convert_ids_to_tokens(ends))
            raise UserError(
                f"answers end at {len(ends)} tokens ({names}) and a gguf file names {MOST_ENDS}; "
                "name fewer in the eos_token_id of generation_config.json"
            )
        return {
            "general.name": _harmless(self.name or name or Path(model.config._name_or_path).name or model.config.model_type),
            **network_keys(model.config),
            **vocabulary_keys(tokenizer, model.config.vocab_size, ends),
        }

    def types_of(self, quantised: int) -> tuple[Type, ...]:
        """Types of the files that are written of a model whose codes have so many bits; 0: it has none."""
        if self.types == "auto":
            return (_PACKED[quantised] if quantised else "f16",)
        return tuple(dict.fromkeys(self.types))

    def write_file(self, model: Any, packed: Mapping[str, Any], type: Type, keys: Keys, path: Path) -> Path:
        """Write one file whose keys are these."""
        from gguf import GGUFWriter

        found = tensors(model, packed if type == _PACKED.get(bits_in(packed)) else {}, type, self.embeddings)
        writer = GGUFWriter(path, architecture_of(model.config))
        write_keys(writer, keys | {"general.file_type": _FILE_TYPES[type], "general.quantization_version": 2})
        for name, bytes_or_floats, raw_type in found:
            writer.add_tensor(name, bytes_or_floats, raw_dtype=raw_type)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        except OSError as error:
            for file in writer.fout or ():
                with suppress(OSError):  # what is not written yet fails again
                    file.close()
            # NumPy says how many bytes went missing, and not why
            raise error if error.errno else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        return path


def _harmless(name: str) -> str:
    """The name without the signs by which llama.cpp would take the tokenizer for Phi-3's or ModernBERT's."""
    return re.sub(r"(?i)(phi)-?(?=3)|(modern)-(?=bert)", lambda match: f"{match[1] or match[2]} ", name)


def _file_name(type: Type, quantised: int) -> str:
    exact = _PACKED.get(quantised)
    return f"model-{type}.gguf" if exact in (None, type) else f"model-{exact}-as-{type}.gguf"
