"""A static page that runs a model in the reader's own browser: llama.cpp as WebAssembly, no server but one of files."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from potstill.core.errors import UserError
from potstill.data.pieces import pieces_of
from potstill.edges.codes import bits_in
from potstill.edges.tokens import FIRST_NAME, beginning, control_tokens
from potstill.exporters import Exporter
from potstill.exporters._vocabulary import composes
from potstill.exporters._wllama import VERSION, wllama_files, wllama_problem
from potstill.exporters.gguf import Gguf

FOLDER = "web"
_MOST_BYTES = 2**31 - 1  # of a file that browsers hold in one piece
# what the page does not run without, beside model.bin
PAGE_FILES = ("index.html", "page.js", "page.css", "opened.js", "wllama.js", "wllama.wasm", "model.json")


class Web(Exporter, kind="web"):
    """Writes the folder `web/`, which any file server serves: `python -m http.server -d web`. It asks nobody else for anything.

    A page in English and Spanish, the model (quantised as it is, else float16) and wllama, which npm fetches once. It
    runs in one thread, for which no header is needed. Prompts are written as in training; control tokens go by private names
    in its model file, so that no text that a reader types can spell one, and that file is for the page alone.
    """

    wllama: str = Field(default="", description="wllama's archive or folder, see `npm pack`; default: npm fetches it once")
    embeddings: Literal["f16", "q8_0"] = Field(default="f16", description="embeddings and head of a quantised model")
    positions: int = Field(default=2048, ge=64, description="of the conversation, prompt and answers; the model's at most")
    remember: bool = Field(default=True, description="earlier turns are part of a prompt unless the reader says otherwise")

    def problems(self, config: Any, tokenizer: Any, *, quantised: int) -> list[str]:
        found = self._gguf().problems(config, tokenizer, quantised=quantised)
        if not tokenizer.chat_template:
            found.append("the web exporter needs a chat template, and the tokenizer has none; export a model trained to answer")
        elif pieces_of(tokenizer) is None:
            found.append(
                "the web exporter writes prompts from fixed texts around what is said, and this chat template writes none "
                "such; export 'gguf' for llama.cpp instead"
            )
        return found + [problem for problem in [wllama_problem(self.wllama)] if problem]

    def holds(self, stored: str, *, quantised: int) -> dict[str, str]:
        (held,) = self._gguf().holds(stored, quantised=quantised).values()
        return {f"{FOLDER}/model.bin": held}

    def write_files(self, model: Any, tokenizer: Any, packed: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
        library = wllama_files(self.wllama)
        into = folder / FOLDER
        into.mkdir()
        file = into / "model.bin"
        gguf = self._gguf()
        keys, type = gguf.keys(model, tokenizer, name), gguf.types_of(bits_in(packed))[0]
        gguf.write_file(model, packed, type, _with_private_names(keys, private_names(tokenizer)), file)
        if file.stat().st_size > _MOST_BYTES:
            raise UserError(
                f"the model is {file.stat().st_size / 1e9:.1f} GB, and browsers hold at most 2 GB; use a smaller one"
            )
        told = prompt_parts(tokenizer) | {"name": keys["general.name"], "bytes": file.stat().st_size}
        told |= {"positions": min(self.positions, model.config.max_position_embeddings), "remember": self.remember}
        told |= {"type": type, "wllama": VERSION}
        (into / "model.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
        for file_name, content in (library | _page()).items():
            (into / file_name).write_bytes(content)
        return sorted(into.iterdir())

    def _gguf(self) -> Gguf:
        return Gguf(embeddings=self.embeddings)


def private_names(tokenizer: Any) -> dict[str, str]:
    """What control tokens are called in the page's model file: one private-use character each."""
    return {text: chr(FIRST_NAME + i) for i, text in enumerate(control_tokens(tokenizer))}


def prompt_parts(tokenizer: Any) -> dict[str, Any]:
    """What the page must know of a tokenizer to write prompts, control tokens by their private names."""
    pieces, names = pieces_of(tokenizer), private_names(tokenizer)
    if pieces is None:
        return {}  # no page is written with such a template, see `Web.problems`
    added = "".join(tokenizer.convert_ids_to_tokens(beginning(tokenizer)))  # llama.cpp writes it itself
    spelt = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")

    def renamed(value: Any) -> Any:
        if isinstance(value, str):
            return spelt.sub(lambda found: names[found[0]], value)
        if isinstance(value, Mapping):
            return {key: renamed(item) for key, item in value.items()}
        return [renamed(item) for item in value] if isinstance(value, list | tuple) else value

    told = asdict(pieces)
    for opening in (told["alone"], told["several"]):
        opening["bare"] = opening["bare"].removeprefix(added)
        if opening["system"]:
            opening["system"] = (opening["system"][0].removeprefix(added), opening["system"][1])
    return {
        "pieces": renamed(told),
        "private": [chr(FIRST_NAME), chr(FIRST_NAME + len(names))],  # readers' text is kept free of these
        "composes": composes(tokenizer),
    }


def _with_private_names(keys: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A file's keys with control tokens by other names, and without the chat template, which spells them."""
    kept = {key: value for key, value in keys.items() if not key.startswith("tokenizer.chat_template")}
    return kept | {"tokenizer.ggml.tokens": [names.get(token, token) for token in keys["tokenizer.ggml.tokens"]]}


def _page() -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (files("potstill.exporters") / "web_page").iterdir() if file.is_file()}
