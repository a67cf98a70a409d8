"""GGUF files that are not as they should be, and a runtime that is not: one clear message each, exit status 2."""

import struct
from pathlib import Path

import pytest
from llamacpp import needs_llamacpp
from tiny_parts import chat_tokenizer, tiny_model
from tiny_run import call

from potstill.core.artifact import Artifact, file_hash
from potstill.edges import gguf_files, llamacpp
from potstill.exporters.gguf import Gguf

ASKED = {"chat": ["--prompt", "Hi", "--max-new-tokens", "4"], "serve": ["--port", "0"]}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = chat_tokenizer(320)
    model = tiny_model("qwen2", len(tokenizer), eos=tokenizer.eos_token_id, std=0.3)
    return Gguf(types=("f32",)).write(model, tokenizer, {}, tmp_path_factory.mktemp("whole"))[0]


def refused(program: str, file: Path, *more: str) -> str:
    """What the program says of a file that it does not take."""
    result = call(program, str(file), *ASKED[program], *more)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def damaged(file: Path, folder: Path, place: int, bit: int) -> Path:
    """A copy with one bit flipped."""
    raw = bytearray(file.read_bytes())
    raw[place] ^= 1 << bit
    (made := folder / "damaged.gguf").write_bytes(raw)
    return made


@pytest.mark.parametrize("program", ASKED)
@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (0.0, "not a GGUF file"),
        (0.0001, "truncated or damaged in its header"),
        (0.03, "truncated or damaged in its header"),
        (0.5, "truncated, "),
        (0.999, "truncated, "),
    ],
)
def test_a_file_cut_short(program: str, kept: float, said: str, file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    (cut := tmp_path / "cut.gguf").write_bytes(whole[: int(kept * len(whole))])
    told = refused(program, cut)
    assert said in told
    assert told.endswith("copy or download it again")


FLIPS = [
    (b"GGUF", 1, 2, "not a GGUF file"),
    (b"\x03\x00\x00\x00", 0, 3, "GGUF version 11 is not known"),
    (b"general.architecture", 4, 0, "it does not say which network it holds"),
    (b"qwen2", 4, 0, "lacks 'qwen3."),
    (b"qwen2.block_count", 12, 0, "is not known here"),
    (b"tokenizer.ggml.tokens", 16, 1, "it holds no tokenizer.ggml.tokens"),
    (b"tokenizer.chat_template", 23 + 4 + 8, 7, "its chat template is not text in UTF-8"),
]


@pytest.mark.parametrize("program", ASKED)
@pytest.mark.parametrize(
    ("near", "behind", "bit", "said"), FLIPS, ids=[near.decode()[:20].strip("\x00\x03") for near, *_ in FLIPS]
)
def test_a_flipped_bit_in_the_header(
    program: str, near: bytes, behind: int, bit: int, said: str, file: Path, tmp_path: Path
) -> None:
    place = file.read_bytes().index(near) + behind
    told = refused(program, damaged(file, tmp_path, place, bit))
    assert said in told


@needs_llamacpp
@pytest.mark.parametrize("program", ASKED)
def test_a_weight_that_is_no_number_is_seen_without_a_manifest(program: str, file: Path, tmp_path: Path) -> None:
    place = gguf_files.read(str(file), file).tensors["blk.0.ffn_up.weight"].offset
    raw = bytearray(file.read_bytes())
    raw[place : place + 4] = struct.pack("<f", float("nan"))
    (made := tmp_path / "nan.gguf").write_bytes(raw)
    assert "found tensors with invalid data" in refused(program, made)


@pytest.mark.parametrize("program", ASKED)
def test_a_flipped_bit_of_a_weight_is_seen_where_a_manifest_lies_beside_the_file(
    program: str, file: Path, tmp_path: Path
) -> None:
    (work := tmp_path / "work").mkdir()
    listed = {"damaged.gguf": [file.stat().st_size, file_hash(file)]}
    (work / "damaged.gguf").write_bytes(file.read_bytes())
    made = Artifact(tmp_path / "export", "files", "export", "export", "0" * 64, summary={"files": listed}).commit(work)
    assert call("chat", str(made.folder / "damaged.gguf"), *ASKED["chat"]).exit_code == 0
    broken = damaged(file, made.folder, file.stat().st_size - 64, 0)
    assert "has the right size and another content: a bit flipped" in refused(program, broken)


@pytest.mark.parametrize(("name", "value"), [("PACKAGE", "no_such_runtime"), ("OLDEST", (9999, 1))])
def test_without_a_runtime_that_can_be_used(
    name: str, value: object, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamacpp, name, value)
    why = "llama.cpp is not here" if name == "PACKAGE" else "is older than 9999.1" if llamacpp.runtime_version() else "not here"
    told = refused("serve", file, "--engine", "llama.cpp")
    assert why in told
    assert "potstill[device]" in told
    assert why in refused("serve", file, "--draft", str(file))
    result = call("chat", str(file), *ASKED["chat"])  # torch answers in its place
    assert result.exit_code == 0, result.output


@needs_llamacpp
def test_a_prompt_beyond_the_context(file: Path) -> None:
    result = call("chat", str(file), "--prompt", "word " * 400)
    assert result.exit_code == 2
    assert "that is longer than the 256 tokens of this conversation" in result.output
