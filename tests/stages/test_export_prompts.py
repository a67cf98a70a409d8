"""What an export's template writes is what the model was trained on: in transformers and in llama.cpp."""

import json
import socket
import urllib.request
from pathlib import Path
from typing import Any

import habits
import pytest
from habits import tokenizer_with, with_bos
from tiny_parts import gpt2_tokenizer, tiny_model, write_rows

from potstill.core.types import Example, Turn
from potstill.data.exported import exported_template
from potstill.data.prompts import Prompts, Renderer
from potstill.edges.models import load_tokenizer, save_model

ROOM = {"max_tokens": 250, "max_prompt_tokens": 200}
ASKED = [
    Example("k", "Say peat.", "Peat."),
    Example("k", "Again.", "Oak.", history=(Turn("user", "Say oak."), Turn("assistant", "Oak."))),
    Example("k", "Again.", "Oak.", history=(Turn("system", "Be kind."), Turn("user", "Say oak."), Turn("assistant", "Oak."))),
]


def messages_of(example: Example) -> list[dict[str, str]]:
    turns = [*example.history, Turn("user", example.instruction)]
    return [{"role": turn.role, "content": turn.content} for turn in turns]


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("prompts", [{"format": "alpaca"}, {"system": "Be brief."}])
def test_the_folder_asks_as_the_model_was_trained(prompts: dict[str, Any], quantised: bool, tmp_path: Path) -> None:
    import potstill as ps

    tokenizer = with_bos(tokenizer_with(habits.CHATML))
    save_model(tiny_model("qwen2", len(tokenizer)), tokenizer, tmp_path / "base")
    settings = Prompts(**prompts, **ROOM)
    data = ps.Source.parse({"kind": "jsonl", "path": str(write_rows(tmp_path / "rows.jsonl", 40)), "context": "context"})
    optim, quiet = ps.Optim(steps=1), ps.Validation(times=0)
    stage = ps.SFT(model=f"path:{tmp_path / 'base'}", data=data, prompts=settings, optim=optim, validation=quiet)
    model = ps.run_stage(stage, tmp_path / "sft")
    assert model.summary["data"]["begins_with"] == "<s>"
    if quantised:  # with prompts of its own for calibration, which are not what was trained
        model = ps.run_stage(ps.Quantize(model=model, data=data, prompts=Prompts(**ROOM), rows=2), tmp_path / "q4")
    export = ps.run_stage(ps.Export(model=model, formats=(ps.Exporter.parse("safetensors"),)), tmp_path / "export")
    theirs = load_tokenizer(f"path:{export.folder}")
    renderer = Renderer(tokenizer, settings)
    for example in ASKED:
        ids = theirs.apply_chat_template(messages_of(example), add_generation_prompt=True, return_dict=False)
        assert ids == renderer.prompt(example).ids
        assert ids.count(theirs.bos_token_id) == 1


class LlamaCpp:
    """llama.cpp's own server with a model of random weights and this tokenizer."""

    def __init__(self, tokenizer: Any, folder: Path) -> None:
        import xllamacpp

        from potstill.exporters.gguf import Gguf

        family = "gpt2" if type(tokenizer).__name__.startswith("GPT2") else "qwen2"
        wide = {} if family == "gpt2" else {"hidden_size": 64, "intermediate_size": 128}
        model = tiny_model(family, len(tokenizer), width=64, **wide)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        (file,) = Gguf().write(model, tokenizer, {}, folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        parameters = xllamacpp.CommonParams()
        parameters.model.path, parameters.n_ctx, parameters.port = str(file), 256, port
        parameters.cpuparams.n_threads, parameters.use_jinja, parameters.warmup = 1, True, False
        self.server = xllamacpp.Server(parameters)

    def ask(self, path: str, **body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """The tokens of a conversation, as a chat completion makes them."""
        text = self.ask("/apply-template", messages=messages)["prompt"]
        ids = self.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        answer = self.ask("/v1/chat/completions", messages=messages, max_tokens=1)
        assert answer["usage"]["prompt_tokens"] == len(ids)
        return ids


@pytest.mark.parametrize(
    ("template", "bos", "prompts"),
    [
        (habits.CHATML, False, {}),
        (habits.CHATML, True, {"system": 'It\'s "so",\n\\ brief.'}),
        ("{{ bos_token }}" + habits.CHATML, True, {}),
        (habits.NO_SYSTEM, True, {"system": "S.", "system_turn": "user"}),
        (habits.CHATML, False, {"thinking": "strip"}),
        (habits.OPENS_THOUGHT, False, {"generation_prompt": "<|im_start|>assistant\n"}),
        (habits.DATED, True, {"date": "2026-11-28"}),
        (habits.CHATML, True, {"format": "alpaca"}),
        (None, False, {"format": "alpaca_es"}),
    ],
)
def test_llama_cpp_reads_what_was_trained(template: str | None, bos: bool, prompts: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install xllamacpp)")
    tokenizer = gpt2_tokenizer() if template is None else tokenizer_with(template)
    tokenizer = with_bos(tokenizer) if bos else tokenizer
    settings = Prompts(**prompts, **ROOM)
    wanted = [Renderer(tokenizer, settings).prompt(example).ids for example in ASKED]
    tokenizer.chat_template = exported_template(tokenizer, settings)
    llama = LlamaCpp(tokenizer, tmp_path)
    assert [llama.prompt(messages_of(example)) for example in ASKED] == wanted
