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

Type = Literal["f32", "f16", "q4_0", "q8_0"]
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7}
_PACKED: dict[int, Type] = {4: "q4_0", 8: "q8_0"}  # by bits


class Gguf(Exporter, kind="gguf"):
    """Writes `model-f16.gguf`, or `model-q4_0.gguf` of a quantised model, `model-q8_0.gguf` of one of 8 bits.

    That file repacks the solver's codes and scales bit for bit and quantises nothing again; layers that were kept at
    full precision are f16 in it. Norms and biases are f32 in every file. Other types of a quantised model hold its quantised
    weights too, and say so in their name (`model-q4_0-as-f16.gguf`): for full precision export the model that was quantised.
    Qwen 2 and 3, Llama, Mistral, Gemma 3 (text), SmolLM 3 and GPT-2.
    """

    types: Literal["auto"] | tuple[Type, ...] = Field(
        default="auto", description="of the weights, a file each; auto: q4_0 or q8_0 of a quantised model, else f16"
    )
    embeddings: Literal["f16", "q8_0"] = Field(
        default="f16", description="embeddings and head of the q4_0 file, where they were not quantised with the model"
    )
    name: str = Field(default="", description="the model's name in the file; default: recipe and stage, or the base model")

    def problems(self, config: Any, tokenizer: Any, *, quantised: int) -> list[str]:
        types = self._types(quantised)
        found = network_problems(config)
        for bits, type in _PACKED.items():
            if type in types and bits != quantised:
                is_not = f"is quantised to {quantised} bits" if quantised else "is not quantised"
                remedy = f"quantise it to {bits} bits, or drop '{type}'"
                found.append(f"the gguf exporter's types name '{type}' but the model {is_not}; {remedy}")
        if "q4_0" in types and self.embeddings == "q8_0" and config.hidden_size % BLOCK:
            found.append(f"embeddings = 'q8_0' needs a width divisible by {BLOCK}, not {config.hidden_size}; use 'f16'")
        return found + vocabulary_problems(tokenizer, config.vocab_size)

    def holds(self, stored: str, *, quantised: int) -> dict[str, str]:
        types = {"f32": "float32", "f16": "float16", "q8_0": "float16"}
        types["q4_0"] = {"f16": "float16", "q8_0": "q8_0"}[self.embeddings]
        return {_file_name(type, quantised): types[type] for type in self._types(quantised)}

    def write_files(self, model: Any, tokenizer: Any, packed: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
        ends = end_ids(model, tokenizer)
        if len(ends) > MOST_ENDS:
            names = ", ".join(tokenizer.convert_ids_to_tokens(ends))
            raise UserError(
                f"answers end at {len(ends)} tokens ({names}) and a gguf file names {MOST_ENDS}; "
                "name fewer in the eos_token_id of generation_config.json"
            )
        keys: Keys = {
            "general.name": _harmless(self.name or name or Path(model.config._name_or_path).name or model.config.model_type),
            **network_keys(model.config),
            **vocabulary_keys(tokenizer, model.config.vocab_size, ends),
        }
        types = self._types(bits_in(packed))
        return [self._write_file(model, packed, type, keys, folder / _file_name(type, bits_in(packed))) for type in types]

    def _types(self, quantised: int) -> tuple[Type, ...]:
        if self.types == "auto":
            return (_PACKED[quantised] if quantised else "f16",)
        return tuple(dict.fromkeys(self.types))

    def _write_file(self, model: Any, packed: Mapping[str, Any], type: Type, keys: Keys, path: Path) -> Path:
        from gguf import GGUFWriter

        found = tensors(model, packed if type in _PACKED.values() else {}, type, self.embeddings)
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
