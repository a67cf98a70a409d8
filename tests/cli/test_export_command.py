"""`potstill export`: a finished model in another format, without a recipe."""

import json
import shlex
from pathlib import Path
from typing import Any

from tiny_run import Place, call

from potstill.commands.export import next_steps
from potstill.core.artifact import Artifact
from potstill.run.models import talks_in_turns

QUANTISED = """
[[stage]]
name = "q4"
kind = "quantize"
model = "stage:base"
method = "rtn"
rows = 1

[[stage]]
name = "q8"
kind = "quantize"
model = "stage:base"
method = "rtn"
bits = 8
rows = 1
"""


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


def test_of_a_run_with_eight_bits_beside_four_the_four_are_written(place: Place, tmp_path: Path) -> None:
    path = Path(place.recipe)
    base, _, _ = path.read_text().replace("= 16", "= 32", 1).partition('[[stage]]\nname = "sft"')
    path.write_text(base + QUANTISED)
    assert place.run("--quiet").exit_code == 0
    done = call("export", str(place.out), "--to", "compressed_tensors", "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    done = call("export", f"{place.out}:q8", "--to", "compressed_tensors", "--out", str(tmp_path / "q8"))
    assert "the model is quantised to 8 bits; export 'gguf'" in done.output


def test_a_control_that_was_rounded_is_not_taken_for_the_four_bit_model(place: Place, tmp_path: Path) -> None:
    path = Path(place.recipe)
    base, _, _ = path.read_text().replace("= 16", "= 32", 1).partition('[[stage]]\nname = "sft"')
    path.write_text(base + QUANTISED.replace('method = "rtn"', 'method = "gptq"', 1).replace("bits = 8", "bits = 4"))
    assert place.run("--quiet").exit_code == 0
    done = call("export", str(place.out), "--to", "gguf", "--out", str(tmp_path / "out"), "--json")
    assert done.exit_code == 0, done.output
    assert "/q4-" in str(Artifact.load(tmp_path / "out").stage["model"]), "q8, the last one, is rounded"


def test_whether_a_model_talks_in_turns_is_what_it_was_trained_on(tmp_path: Path) -> None:
    def made(name: str, stage: dict[str, Any], parents: dict[str, str], **summary: Any) -> Artifact:
        work = tmp_path / f".{name}"
        work.mkdir()
        one = Artifact(tmp_path / name, name, "best", "model", f"of {name}", parents, stage=stage, summary=summary)
        return one.commit(work)

    trained = {"data": {"messages": "messages"}, "optim": {}}
    best = made("best", {"candidates": []}, {}, chosen={"kind": "sft", "stage": trained})
    four_bit = made("q4", {"model": "stage:best", "data": {"path": "rows"}}, {"best": best.fingerprint})
    single = made("single", {"data": {"path": "rows"}, "optim": {}}, {})
    assert [talks_in_turns(one) for one in (best, four_bit, single)] == [True, True, False]


def test_the_command_that_serves_a_page_takes_a_folder_with_blanks(tmp_path: Path) -> None:
    files = {"web/index.html": (5, ""), "web/model.bin": (2_000_000, "")}
    made = Artifact(tmp_path / "my model; rm", "export", "export", "export", "", summary={"files": files})
    (command,) = [line for line in next_steps(made) if "http.server" in line]
    assert shlex.split(command, comments=True)[-2:] == ["-d", str(made.folder / "web")]
