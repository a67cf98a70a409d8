"""Models as llama.cpp, Ollama and LM Studio keep them: one GGUF file, read as a config, weights and a tokenizer.

The file's own keys say everything. A key, tensor, type or name that is not known here is refused by name, because whatever is
passed over in silence makes another model of it.
"""

from potstill.edges.gguf_files.byte_level import byte_level_note
from potstill.edges.gguf_files.header import read
from potstill.edges.gguf_files.networks import config_of
from potstill.edges.gguf_files.tokenizer import tokenizer_of
from potstill.edges.gguf_files.weights import stored_in

__all__ = ["byte_level_note", "config_of", "read", "stored_in", "tokenizer_of"]
