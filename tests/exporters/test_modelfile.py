"""Fixed pieces, and Go's template made of them, write what the Jinja template writes."""

import json
import shutil
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import chat_templates
import pytest
from tiny_export import tiny_model, train_tokenizer

from potstill.data.exported import exported_template
from potstill.data.pieces import pieces_of
from potstill.data.prompts import PLAIN, Prompts
from potstill.exporters.modelfile import go_template, modelfile

GO = """package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Message struct { Role, Content string }

func main() {
	var asked []struct { Template string; Messages []*Message }
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil { panic(err) }
	written := []string{}
	for _, one := range asked {
		var system []string
		for _, message := range one.Messages { if message.Role == "system" { system = append(system, message.Content) } }
		var out strings.Builder
		made := template.Must(template.New("").Option("missingkey=zero").Parse(one.Template))
		values := map[string]any{"System": strings.Join(system, "\\n\\n"), "Messages": one.Messages, "Response": ""}
		if err := made.Execute(&out, values); err != nil { panic(err) }
		written = append(written, out.String())
	}
	if err := json.NewEncoder(os.Stdout).Encode(written); err != nil { panic(err) }
}
"""
TEXTS = ("What is 2 + 2?", 'A "quoted" {{ .System }} <b>', "two\nlines", "¿Qué?", "`x` \\n", "last")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import pre_tokenizers

    return train_tokenizer([pre_tokenizers.ByteLevel(add_prefix_space=False)])


def conversations(*, system: bool = True) -> list[list[dict[str, str]]]:
    found = []
    for count, with_system in product((1, 3, 5), (False, True) if system else (False,)):
        turns = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(TEXTS[:count])]
        found.append([{"role": "system", "content": 'Be "brief".'}, *turns] if with_system else turns)
    return found


def by_jinja(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


TRAINED = [
    *((name, None) for name in ("CHATML", "OWN_SYSTEM", "NO_SYSTEM", "TRIMS", "TRIMS_ALL", "FORGETS")),
    ("CHATML", Prompts(system='Speak {{ "plainly" }},\n"always".')),
    ("CHATML", Prompts(system="One\u00a0line", system_turn="user")),
    ("CHATML", Prompts(generation_prompt="<|im_start|>assistant\n<think>\n", thinking="strip")),
    *(("CHATML", Prompts(format=form)) for form in sorted(PLAIN)),
]


def trained(tokenizer: Any, template: str, prompts: Prompts | None) -> Any:
    tokenizer.chat_template = getattr(chat_templates, template)
    if prompts is not None:
        tokenizer.chat_template = exported_template(tokenizer, prompts)
    return tokenizer


@pytest.mark.parametrize("template, prompts", TRAINED)
def test_pieces_write_what_the_template_writes(template: str, prompts: Prompts | None, tokenizer: Any) -> None:
    pieces = pieces_of(trained(tokenizer, template, prompts))
    assert pieces is not None
    for messages in conversations(system=pieces.alone.system is not None):
        assert pieces.text(messages) == by_jinja(tokenizer, messages)


@pytest.mark.parametrize("template", ["COUNTS", "SHOUTS"])
def test_a_template_that_is_no_fixed_text_has_no_pieces(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = getattr(chat_templates, template)
    assert pieces_of(tokenizer) is None
    written = modelfile(tiny_model("qwen2"), tokenizer, ["m.gguf"])
    assert "# No TEMPLATE: " in written
    assert "\nTEMPLATE" not in written


def test_go_writes_what_the_template_writes(tokenizer: Any, tmp_path: Path) -> None:
    go = shutil.which("go")
    if go is None:
        pytest.skip("Go is not here, so Ollama's template language cannot be tried: apt-get install golang-go")
    asked, expected = [], []
    for template, prompts in TRAINED:
        pieces = pieces_of(trained(tokenizer, template, prompts))
        assert pieces is not None
        for messages in conversations(system=pieces.alone.system is not None):
            asked.append({"Template": go_template(pieces), "Messages": messages})
            expected.append(by_jinja(tokenizer, messages))
    (tmp_path / "main.go").write_text(GO)
    done = subprocess.run(
        [go, "run", str(tmp_path / "main.go")], input=json.dumps(asked), text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def read(modelfile: str) -> dict[str, list[str]]:
    """A Modelfile as Ollama reads it: no escapes, a value in three quotes may have lines."""
    found: dict[str, list[str]] = {}
    rest = modelfile
    while rest:
        line, _, rest = rest.partition("\n")
        if not line or line.startswith("#"):
            continue
        name, _, value = line.partition(" ")
        if value.startswith('"""'):
            body = value[3:] + "\n" + rest
            value, _, rest = body.partition('"""\n')
        found.setdefault(name, []).append(value)
    return found


def test_the_file_holds_the_template_the_system_message_and_the_ends(tokenizer: Any) -> None:
    trained(tokenizer, "CHATML", Prompts(system='Be "brief".\nAlways.'))
    found = read(modelfile(tiny_model("qwen2"), tokenizer, ["model-q4_0.gguf", "model-f16.gguf"]))
    assert found["FROM"] == ["./model-q4_0.gguf"]
    assert found["SYSTEM"] == ['Be "brief".\nAlways.']
    assert found["PARAMETER"] == ["num_ctx 128", "temperature 0", 'stop "<|im_end|>"']
    pieces = pieces_of(tokenizer)
    assert pieces is not None
    assert found["TEMPLATE"] == [go_template(pieces)]
    assert found["TEMPLATE"][0].startswith("{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n")


@pytest.mark.parametrize("template, trims", [("CHATML", (False, False)), ("TRIMS", (True, False)), ("TRIMS_ALL", (True, True))])
def test_what_go_cannot_say_is_said_to_the_reader(template: str, trims: tuple[bool, bool], tokenizer: Any) -> None:
    pieces = pieces_of(trained(tokenizer, template, None))
    assert pieces is not None
    assert (pieces.trims, pieces.trims_system) == trims
    messages = [{"role": "system", "content": " s "}, {"role": "user", "content": " q "}]
    assert pieces.text(messages) == by_jinja(tokenizer, messages)
    assert ("keeps white space" in modelfile(tiny_model("qwen2"), tokenizer, ["m.gguf"])) == any(trims)


def test_a_model_without_a_template_is_given_the_bare_text(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    assert read(modelfile(tiny_model("qwen2"), tokenizer, ["m.gguf"]))["TEMPLATE"] == ["{{ .Prompt }}"]


def test_what_the_runtime_writes_before_every_prompt_is_not_written_twice(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ '<s>' }}" + chat_templates.CHATML
    pieces = pieces_of(tokenizer)
    assert pieces is not None
    assert "<s>" not in go_template(pieces, added="<s>")
    assert go_template(pieces).count("<s>") == 2
