"""`potstill export`: a finished model in another format, without a recipe."""

import json
from pathlib import Path

from tiny_run import Place, call


def test_a_finished_model_is_written_and_the_commands_that_run_it(finished: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call("export", f"{finished.out}:sft", "--to", "gguf", "--to", "safetensors", "--out", str(out), "--quiet")
    assert done.exit_code == 0, done.output
    assert {"model-f16.gguf", "Modelfile", "README.md", "model.safetensors"} < {path.name for path in out.iterdir()}
    assert f"llama-cli -m {out}/model-f16.gguf" in done.output
    again = call("export", f"{finished.out}:sft", "--to", "gguf", "--to", "safetensors", "--out", str(out), "--json")
    assert json.loads(again.output)["folder"] == str(out), "the same again does nothing"
    other = call("export", f"{finished.out}:sft", "--to", "gguf", "--out", str(out))
    assert other.exit_code == 2


def test_what_cannot_be_is_one_clear_error(finished: Place, tmp_path: Path) -> None:
    for words, rule in (
        (("--to", "ggfu"), "--to ggfu: no such format; did you mean 'gguf'?"),
        (("--to", "gguf", "--wllama", "x"), "--wllama is for --to web; leave it out"),
        (("--to", "web", "--wllama", "nowhere"), "wllama: no file or folder 'nowhere'"),
        (("--to", "compressed_tensors"), "the model is not quantised; quantise it first"),
    ):
        done = call("export", str(finished.out), *words, "--out", str(tmp_path / "out"))
        assert done.exit_code == 2
        assert rule in done.output
    assert "no run there" in call("export", str(tmp_path), "--to", "gguf").output
    assert "no model 'x'" in call("export", f"{finished.out}:x", "--to", "gguf").output
    assert not list(tmp_path.glob("out/*"))
