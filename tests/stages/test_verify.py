"""An exported file answers as its model does, or is not called finished; damage is found before the runtime is asked."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from llamacpp import needs_llamacpp
from tiny_parts import chat_tokenizer, tiny_model, write_rows

import potstill
from potstill.cli import main
from potstill.commands.verify import passed, print_record
from potstill.core.artifact import Artifact, Hashes
from potstill.core.errors import UserError
from potstill.edges import llamacpp
from potstill.edges.models import as_dtype, load_stored, load_tokenizer, save_model
from potstill.exporters import Exporter
from potstill.exporters.gguf import Gguf
from potstill.report.verified import section, with_section
from potstill.stages.export import as_trained
from potstill.stages.passages import Passages, passages_for
from potstill.stages.reference import Reference, logp_at
from potstill.stages.runtimes import Theirs
from potstill.stages.verified import VERIFIED, _judged, record_beside, verify_files

PROMPTS = potstill.Prompts(max_tokens=250, max_prompt_tokens=200)


def command(*words: Any) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, words), "--positions", "8"], catch_exceptions=False)


def save(folder: Path, seed: int = 0) -> str:
    tokenizer = chat_tokenizer()
    save_model(tiny_model("qwen2", len(tokenizer), eos=tokenizer.eos_token_id, seed=seed, std=0.1), tokenizer, folder)
    return f"path:{folder}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model that was trained here, its four-bit form and the exports of both."""
    root = tmp_path_factory.mktemp("verify")
    where = save(root / "base")
    data = potstill.Jsonl(path=str(write_rows(root / "rows.jsonl")), language_column="language")
    tuned = potstill.run_stage(
        potstill.SFT(
            name="sft",
            model=where,
            data=data,
            prompts=PROMPTS,
            optim=potstill.Optim(steps=2),
            validation=potstill.Validation(times=0),
        ),
        root / "sft",
    )
    four = potstill.run_stage(potstill.Quantize(name="q4", model=tuned, data=data, prompts=PROMPTS, rows=8), root / "q4")
    wide = potstill.Export(model=tuned, formats=("safetensors", Gguf(types=("f16", "q8_0"))), verify="always")
    return {
        "tuned": tuned,
        "four": four,
        "wide": potstill.run_stage(wide, root / "wide"),
        "narrow": potstill.run_stage(potstill.Export(model=four, formats=("gguf",)), root / "narrow"),
    }


def record_of(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact.folder / VERIFIED).read_text(encoding="utf-8"))


@needs_llamacpp
def test_an_export_says_how_far_its_files_are_from_the_model(made: dict[str, Any]) -> None:
    record = record_of(made["wide"])
    assert record == made["wide"].summary["verified"]
    assert record["rows"].endswith(" validation rows of sft and 4 built-in texts")
    found = {one["file"]: one for one in record["files"]}
    assert {name: one["type"] for name, one in found.items()} == {
        "model.safetensors": "f32",
        "model-f16.gguf": "f16",
        "model-q8_0.gguf": "q8_0",
    }
    assert all(one["passed"] and one["texts"] >= 80 and not one["differ"] for one in found.values())
    assert found["model.safetensors"]["kl"] == pytest.approx(0, abs=1e-7)
    assert 0 < found["model-f16.gguf"]["kl"] < 1e-4
    assert found["model-f16.gguf"]["kl"] < found["model-q8_0.gguf"]["kl"] < 0.02
    four = record_of(made["narrow"])["files"][0]
    assert (four["type"], four["passed"]) == ("q4_0", True)


@needs_llamacpp
def test_the_command_tells_what_rounding_cost_and_leaves_the_artifact_whole(made: dict[str, Any], tmp_path: Path) -> None:
    done = command(made["narrow"].folder, "--json")
    assert done.exit_code == 0
    (record,) = json.loads(done.stdout)
    assert record["files"][0]["own_kl"] > record["files"][0]["kl"] > 0
    assert record["rows"].endswith(" validation rows of sft and 4 built-in texts")
    assert record_of(made["narrow"])["files"][0]["positions"] == 8
    assert Artifact.load(made["narrow"].folder).damage(Hashes(tmp_path / "hashes.json")) == ""


@needs_llamacpp
def test_a_model_that_is_gone_leaves_open_what_rounding_cost(
    made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is judged all the same, by the limit that depends on nothing, and it is said; another model is none."""
    where = f"path:{made['four'].folder}"
    (tmp_path / "other").mkdir()
    tokenizer = chat_tokenizer(300)
    save_model(tiny_model("qwen2", len(tokenizer), eos=tokenizer.eos_token_id), tokenizer, tmp_path / "other")
    for gone, why in (("gone", "no such folder"), ("other", "it is no longer what was quantised")):
        model, own = load_stored(where), load_tokenizer(where)
        as_trained(made["four"], own)
        full = f"path:{tmp_path / gone}"
        ours = Reference(model, own, passages_for(made["four"], own, 64), "ours", full)
        record = verify_files(made["narrow"].folder, ["model-q4_0.gguf"], ours, positions=4, always_own=True)
        (one,) = record["files"]
        assert (one["passed"], one["own_kl"], one["limit"]) == (True, None, 0.02)
        assert full in one["own_unknown"]
        assert why in one["own_unknown"]
        assert why in "\n".join(section(record))
        print_record({**record, "folder": ""})
        assert why in " ".join(capsys.readouterr().out.split())


@needs_llamacpp
def test_a_flipped_bit_and_a_missing_file_are_found_before_the_runtime_is_asked(made: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    for path in made["wide"].folder.iterdir():
        (folder / path.name).parent.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    damaged = folder / "model-f16.gguf"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    (folder / "model-q8_0.gguf").unlink()
    done = command(folder, "--against", f"path:{made['tuned'].folder}")
    assert done.exit_code == 1
    assert "model-f16.gguf FAILED: has the right size and another content: a bit flipped" in done.stdout
    assert "model-q8_0.gguf FAILED: is missing" in done.stdout
    assert "✓ model.safetensors" in done.stdout
    assert {one["file"]: one["passed"] for one in json.loads((folder / VERIFIED).read_text())["files"]} == {
        "model.safetensors": True,
        "model-f16.gguf": False,
        "model-q8_0.gguf": False,
    }


@needs_llamacpp
def test_what_does_not_show_in_distributions_fails_a_file(made: dict[str, Any], tmp_path: Path) -> None:
    """Another template, or an end of answers that is not named: next tokens are right, and answers wrong."""
    where = f"path:{made['tuned'].folder}"
    model, tokenizer = load_stored(where), load_tokenizer(where)
    Gguf(types=("f32",)).write(model, tokenizer, {}, tmp_path)

    def why() -> str:
        ours = Reference(model, tokenizer, passages_for(made["tuned"], tokenizer, 64), "ours")
        (one,) = verify_files(tmp_path, ["model-f32.gguf"], ours, positions=4)["files"]
        assert one["kl"] < 1e-6
        assert one["passed"] == (one["why"] == "")
        return one["why"]

    assert why() == ""
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("a")]
    assert why() == "it does not name 'a' as an end of answers"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    tokenizer.chat_template += " "
    assert why().startswith("its chat template is not the model's")


@needs_llamacpp
def test_another_model_than_it_was_made_from_leaves_the_record_alone(made: dict[str, Any], tmp_path: Path) -> None:
    before = (made["narrow"].folder / VERIFIED).read_bytes()
    done = command(made["narrow"].folder, "--against", save(tmp_path / "other", seed=3))
    assert done.exit_code == 1
    assert "its own record stays as it is" in " ".join(done.stdout.split())
    assert (made["narrow"].folder / VERIFIED).read_bytes() == before


def test_damage_in_a_folder_fails_and_so_does_a_file_that_is_gone(made: dict[str, Any]) -> None:
    where = f"path:{made['tuned'].folder}"  # nothing of it is asked
    ours = Reference(load_stored(where), load_tokenizer(where), Passages([], [([1], [2])], ""), "ours")
    record = verify_files(made["narrow"].folder, ["web/model.bin"], ours, damaged={"web/page.js": "is missing"})
    assert [one["why"] for one in record["files"]] == ["web/page.js is missing"]
    record = verify_files(made["narrow"].folder, ["web/model.bin"], ours)
    assert not passed(record), "nothing was opened"


def test_the_last_verification_is_what_a_report_reads_and_a_damaged_one_is_none(made: dict[str, Any], tmp_path: Path) -> None:
    export = replace(made["narrow"], folder=tmp_path)
    at_first = export.summary["verified"]
    assert record_beside(export) == at_first
    later = {"files": [{"file": "model-q4_0.gguf", "passed": False, "why": "is missing"}], "not_verified": {}}
    (tmp_path / VERIFIED).write_text(json.dumps(later))
    assert record_beside(export) == later
    for damaged in ("", "[]", '{"files": [1], "not_verified": {}}', '{"files": [{}], "not_verified": {}}', '{"files": []}'):
        (tmp_path / VERIFIED).write_text(damaged)
        assert record_beside(export) == at_first


def test_a_file_that_is_no_weights_cannot_be_verified(made: dict[str, Any]) -> None:
    done = command(made["narrow"].folder / "README.md")
    assert done.exit_code == 2
    assert "holds no weights that can be verified" in done.stderr


@needs_llamacpp
def test_a_file_alone_is_compared_with_what_we_read_of_it_and_says_what_that_leaves_open(
    made: dict[str, Any], tmp_path: Path
) -> None:
    alone = tmp_path / "alone.gguf"
    alone.write_bytes((made["narrow"].folder / "model-q4_0.gguf").read_bytes())
    done = command(alone)
    assert done.exit_code == 0
    assert "no manifest lies beside it, so only the runtime was asked" in " ".join(done.stdout.split())
    assert not (tmp_path / VERIFIED).exists()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(alone.read_bytes()[: alone.stat().st_size // 2])
    done = command(cut)
    assert (done.exit_code, "truncated" in done.stderr) == (2, True)
    done = command(cut, "--against", f"path:{made['tuned'].folder}")
    assert (done.exit_code, "truncated" in done.stdout) == (1, True)


@needs_llamacpp
def test_one_bit_that_flipped_in_a_file_alone_is_found_beside_the_model(made: dict[str, Any], tmp_path: Path) -> None:
    """By its weights: no distribution shows it."""
    data = bytearray((made["narrow"].folder / "model-q4_0.gguf").read_bytes())
    for name in ("whole", "flipped"):
        (tmp_path / f"{name}.gguf").write_bytes(data)
        data[-1000] ^= 1
    found = {
        name: command(tmp_path / f"{name}.gguf", "--against", f"path:{made['four'].folder}") for name in ("whole", "flipped")
    }
    assert (found["whole"].exit_code, found["flipped"].exit_code) == (0, 1)
    assert "15 of 15 weights are the model's bit for bit" in found["whole"].output
    assert "1 of 15 weights are not the model's" in found["flipped"].output


@needs_llamacpp
def test_another_models_file_and_another_cut_of_text_fail(made: dict[str, Any], tmp_path: Path) -> None:
    other = save(tmp_path / "other", seed=5)
    done = command(made["wide"].folder / "model-f16.gguf", "--against", other)
    assert done.exit_code == 1
    assert "is above 0.0001 for f16" in " ".join(done.stdout.split())
    model = potstill.load_model(f"path:{made['tuned'].folder}")
    save_model(model, chat_tokenizer(300), tmp_path / "cut")
    done = command(made["wide"].folder / "model-f16.gguf", "--against", f"path:{tmp_path / 'cut'}")
    assert done.exit_code == 1
    assert "texts differ, such as" in " ".join(done.stdout.split())


def test_a_folder_of_a_smaller_model_fails_and_is_not_asked(made: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(300)
    save_model(tiny_model("qwen2", len(tokenizer), eos=tokenizer.eos_token_id), tokenizer, tmp_path / "small")
    done = command(tmp_path / "small", "--against", f"path:{made['tuned'].folder}")
    assert done.exit_code == 1
    assert "cannot be opened: its vocabulary has 300 rows, and our rows have the token" in " ".join(done.stdout.split())


@pytest.fixture
def broken() -> Iterator[Any]:
    class Broken(Gguf, kind="broken_of_the_law"):
        """A file that answers otherwise than the model."""

        def write_files(self, model: Any, *rest: Any) -> list[Path]:
            import copy

            other = copy.deepcopy(model)
            with torch.no_grad():
                other.model.norm.weight.mul_(1.5)
            return super().write_files(other, *rest)

    yield Broken
    del Exporter.kinds["broken_of_the_law"]


@needs_llamacpp
def test_a_file_that_answers_otherwise_is_no_finished_export(broken: Any, made: dict[str, Any], tmp_path: Path) -> None:
    rule = r"because a file does not answer as path:.* does: model-f16.gguf: .*mean KL .* is above 0.0001 for f16"
    with pytest.raises(UserError, match=rule):
        potstill.run_stage(potstill.Export(model=made["tuned"], formats=(broken(),)), tmp_path / "export")
    assert not (tmp_path / "export").exists()
    kept = potstill.run_stage(potstill.Export(model=made["tuned"], formats=(broken(),), verify="never"), tmp_path / "kept")
    assert record_of(kept)["not_verified"] == {"model-f16.gguf": "the recipe says verify = 'never'"}
    assert command(kept.folder).exit_code == 1


def test_without_the_runtime_it_is_said_and_asking_for_it_is_refused(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamacpp, "PACKAGE", "no_such_runtime")
    exported = potstill.run_stage(potstill.Export(model=made["tuned"], formats=("gguf",)), tmp_path / "export")
    assert record_of(exported)["not_verified"] == {"model-f16.gguf": "llama.cpp is not here; pip install 'potstill[device]'"}
    assert "not verified: model-f16.gguf" in potstill.Export(model=made["tuned"]).closing(exported.summary)
    assert "was not verified: llama.cpp is not here" in "\n".join(section(record_of(exported)))
    done = command(exported.folder)
    assert (done.exit_code, "is not verified: llama.cpp is not here" in done.stdout) == (1, True)
    with pytest.raises(UserError, match="pip install 'potstill\\[device\\]', or set it to 'auto'"):
        potstill.run_stage(potstill.Export(model=made["tuned"], formats=("gguf",), verify="always"), tmp_path / "always")


def test_what_cannot_be_verified_is_one_clear_error(made: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target, rule in (
        (tmp_path / "none", "no run there"),
        (tmp_path / "empty", "holds no .gguf file"),
        (made["tuned"].folder, "and not an export; name an export"),
    ):
        done = command(target)
        assert (done.exit_code, rule in done.stderr) == (2, True), done.stderr


def test_weights_that_float16_does_not_hold_are_told_from_a_file_that_is_wrong() -> None:
    """The same function by weights that are the smallest float16s: rounded, they are a hundredth off."""
    tokenizer, model = chat_tokenizer(), tiny_model("qwen2", len(chat_tokenizer()), std=0.1).eval()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight /= 1.5e5
            block.mlp.down_proj.weight *= 1.5e5
            block.self_attn.v_proj.weight /= 1.5e5
            block.self_attn.o_proj.weight *= 1.5e5
    ours = Reference(model, tokenizer, passages_for(None, tokenizer, 128), "it")
    stored, other = (
        as_dtype(as_dtype(model, torch.float16), torch.float32),
        tiny_model("qwen2", len(tokenizer), seed=1, std=0.1),
    )
    whys = [
        _judged("f16", Theirs(logp_at(one, ours.passages.chosen(16)), [], [], [], "", []), ours, 16, False)["why"]
        for one in (stored, other.eval())
    ]
    assert "by the weights' rounding alone: f16 does not hold this model; choose another type" in whys[0]
    assert whys[1].startswith("mean KL")
    assert "alone" not in whys[1]


def test_passages_fit_the_fewest_positions_and_are_asked_evenly() -> None:
    tokenizer = chat_tokenizer()
    for positions in (8, 64, None):
        passages = passages_for(None, tokenizer, positions)
        assert passages.of == "4 built-in texts"
        for count in (1, 7, 24):
            chosen = passages.chosen(count)
            assert sum(len(places) for _, places in chosen) == min(count, 16 if positions == 8 else count)
            for ids, places in chosen:
                assert len(ids) <= (positions or 10**6)
                assert all(0 < place < len(ids) for place in places)


def test_the_card_holds_one_verification_and_names_what_failed() -> None:
    failed = {"files": [{"file": "a.gguf", "passed": False, "why": "a | b"}], "not_verified": {}, "runtimes": {}}
    record = {"against": "m", "rows": "2 rows", **failed}
    card = "# It\n\n## Results\n\nx\n\n## How to run\n\ny\n"
    once = with_section(card, record)
    assert once.index("## Results") < once.index("## Verified") < once.index("## How to run")
    assert r"**`a.gguf` failed: a \| b. Do not use it.**" in once
    assert with_section(once, record) == once


@needs_llamacpp
def test_chat_refuses_a_file_that_is_not_as_it_was_written(made: dict[str, Any], tmp_path: Path) -> None:
    for path in made["narrow"].folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "model-q4_0.gguf"
    words = ["chat", str(file), "--prompt", "hi", "--max-new-tokens", "2"]
    assert CliRunner().invoke(main, words).exit_code == 0
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert "a bit flipped, or it was changed; export the model again" in done.stderr
