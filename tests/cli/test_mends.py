"""What is finished is compared with its manifest before it counts, and made again where it is damaged or gone."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import Place, call

from potstill.core.artifact import Artifact, Hashes, file_hash

STUDY = """
[[stage]]
name = "study"
kind = "evaluate"
study = [{ name = "SFT", model = "stage:sft", role = "sft" }, { name = "Base", model = "stage:base", role = "base" }]
metrics = ["rouge_l", "nll"]
decoding = { max_new_tokens = 4 }

[[stage]]
name = "page"
kind = "report"
study = "stage:study"
"""


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def other_figure(path: Path) -> None:
    path.write_text(path.read_text().replace('"steps": ', '"steps": 1'))


def flip(path: Path) -> None:
    """One bit, with size and time as they were."""
    stat, raw = path.stat(), bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def weights(place: Place, stage: str) -> str:
    return file_hash(place.artifact(stage) / "model.safetensors")


def states(place: Place, *words: str) -> dict[str, str]:
    rows = json.loads(call("plan", place.recipe, "--out", str(place.out), "--json", *words).stdout)
    return {row["stage"]: row["state"] for row in rows}


@pytest.fixture
def done(finished: Place, tmp_path: Path) -> Place:
    """A finished run of one's own, to be changed."""
    shutil.copytree(finished.folder, tmp_path / "done")
    return Place(tmp_path / "done")


def test_a_manifest_lists_every_file_with_size_and_hash(done):
    folder = done.artifact("sft")
    artifact = Artifact.load(folder)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"artifact.json"}
    assert artifact.files is not None
    assert artifact.files.keys() == there
    assert {"model.safetensors", "config.json", "tokenizer.json", "metrics.jsonl"} <= there
    for name, (size, digest) in artifact.files.items():
        assert (size, digest) == ((folder / name).stat().st_size, file_hash(folder / name))
    assert artifact.contents == {"base": Artifact.load(done.artifact("base")).content}


@pytest.mark.parametrize(
    "name, spoil, told",
    [
        ("model.safetensors", Path.unlink, "model.safetensors is missing"),
        ("model.safetensors", cut, "model.safetensors has "),
        ("config.json", cut, "config.json has "),
        ("tokenizer.json", Path.unlink, "tokenizer.json is missing"),
        ("metrics.jsonl", Path.unlink, "metrics.jsonl is missing"),
        ("artifact.json", cut, "artifact.json cannot be read"),
        ("artifact.json", other_figure, "artifact.json cannot be read"),
        ("artifact.json", lambda path: path.write_text("[]"), "artifact.json cannot be read"),
        ("artifact.json", Path.unlink, "artifact.json is missing"),
    ],
)
@pytest.mark.parametrize("stage", ["base", "sft"])
def test_what_is_damaged_or_gone_is_made_again(done, stage: str, name: str, spoil: Callable[[Path], None], told: str):
    before = weights(done, "base"), weights(done, "sft")
    spoil(done.artifact(stage) / name)
    assert states(done) == {"base": "done", "sft": "done"} | {stage: "damaged"}
    result = done.run()
    assert result.exit_code == 0, result.output
    assert f"{stage:<14} is damaged, and is made again: {told}" in result.stderr
    assert "1 of 2 stages are done already\n" in result.stderr
    assert (weights(done, "base"), weights(done, "sft")) == before
    assert done.run().stderr == "2 of 2 stages are done already\n"


def test_a_flipped_bit_is_found_before_a_stage_reads_it(done):
    whole = weights(done, "base")
    flip(done.artifact("base") / "model.safetensors")
    result = done.run("--set", "sft.optim.steps=3")
    assert result.exit_code == 0, result.output
    assert (
        "base           is damaged, and is made again: model.safetensors has the right size and another content"
        in result.stderr
    )
    assert weights(done, "base") == whole


def test_an_edited_config_is_damage(done):
    config = done.artifact("base") / "config.json"
    config.write_text(config.read_text().replace('"silu"', '"relu"'))
    assert states(done)["base"] == "done", "the size is the same, and nothing reads it"
    assert "base           is damaged" in done.run("--set", "sft.optim.steps=3").stderr


def test_contents_are_read_once(place, monkeypatch):
    done, read = place, list[str]()  # not a copy, whose files nobody has read yet
    assert done.run("--quiet").exit_code == 0
    monkeypatch.setattr("potstill.core.artifact.file_hash", lambda path: (read.append(path.name), file_hash(path))[1])
    done.run("--quiet", "--set", "sft.optim.steps=3")
    committed = [*read]
    assert committed.count("model.safetensors") == 1, "its own, as it was committed; its input's was remembered"
    done.run("--quiet", "--set", "sft.optim.steps=2", "--set", "sft.validation.times=0")
    assert read.count("model.safetensors") == 2


def test_a_run_that_moved_is_still_done(done):
    moved = done.folder / "elsewhere"
    shutil.copytree(done.out, moved)  # other place, other times
    for path in moved.rglob("*"):
        os.utime(path, (1, 1))
    shutil.rmtree(done.out)
    again = call("run", done.recipe, "--out", str(moved))
    assert again.stderr == "2 of 2 stages are done already\n"
    more = call("run", done.recipe, "--out", str(moved), "--set", "sft.optim.steps=3")
    assert more.stderr.startswith("1 of 2 stages are done already\n")


def test_what_was_made_from_an_input_that_came_out_otherwise_is_made_again(done):
    """As on a GPU, where training is not bit for bit the same twice."""
    folder = done.artifact("base")
    artifact = Artifact.load(folder)
    work = done.folder / "again"
    shutil.copytree(folder, work)
    with (work / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1.0}\n')
    (work / "artifact.json").unlink()
    artifact.commit(work)
    assert states(done) == {"base": "done", "sft": "outdated"}
    result = done.run()
    assert "sft            is outdated, and is made again: base was made again and came out otherwise\n" in result.stderr
    assert states(done) == {"base": "done", "sft": "done"}


def test_files_that_others_put_there_do_no_harm(done):
    (done.artifact("sft") / "notes.txt").write_text("the good one")
    assert done.run().stderr == "2 of 2 stages are done already\n"


def test_an_artifact_of_an_older_version_is_made_again(done):
    manifest = done.artifact("sft") / "artifact.json"
    meta = json.loads(manifest.read_text())
    del meta["files"], meta["manifest"]
    manifest.write_text(json.dumps(meta))
    assert "sft            is damaged, and is made again: its manifest lists no files\n" in done.run().stderr


def test_damage_in_an_artifact_that_lies_elsewhere_is_refused(done, tmp_path):
    """A study's manifest alone would vouch for scores that were changed."""
    done.add(STUDY)
    assert done.run("--quiet").exit_code == 0
    study = done.artifact("study")
    page = f'name = "page"\n[[stage]]\nname = "page"\nkind = "report"\nstudy = "path:{study}"\n'
    (tmp_path / "page.toml").write_text(page)
    words = ("run", str(tmp_path / "page.toml"), "--out", str(tmp_path / "page"), "--quiet")
    assert call(*words).exit_code == 0
    flip(study / "study.json")
    refused = call(*words)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"error: {study} is damaged: study.json has the right size and another content; ")


# report and chat, while something else is damaged or still to do


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Place:
    from tiny_run import set_up

    place = set_up(tmp_path_factory.mktemp("reported"))
    place.add(STUDY)
    assert place.run("--quiet").exit_code == 0
    return place


@pytest.fixture
def copied(reported: Place, tmp_path: Path) -> Place:
    shutil.copytree(reported.folder, tmp_path / "copy")
    return Place(tmp_path / "copy")


def test_chat_and_report_need_only_their_own(copied):
    (copied.artifact("base") / "model.safetensors").unlink()
    (copied.artifact("study") / "artifact.json").write_text("damaged")
    assert call("chat", f"{copied.out}:sft", "--prompt", "hi", "--max-new-tokens", "2").exit_code == 0
    assert call("report", str(copied.out)).exit_code == 0


def test_chat_refuses_its_own_damaged_model(copied):
    flip(copied.artifact("sft") / "model.safetensors")
    result = call("chat", f"{copied.out}:sft", "--prompt", "hi")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: sft is damaged: model.safetensors has the right size and another content in "
        f"{copied.artifact('sft')}; run the recipe again to make it again\n"
    )


def test_report_refuses_its_own_damaged_page(copied):
    flip(copied.artifact("page") / "report.json")
    result = call("report", str(copied.out))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: page is damaged: report.json has the right size and another content in ")


def test_of_a_run_that_goes_on_the_finished_part_is_shown(copied):
    shutil.rmtree(copied.artifact("page"))
    shown = call("report", str(copied.out))
    assert shown.exit_code == 0, shown.output
    assert "SFT" in shown.stdout
    assert "no page yet: 3 of 4 stages are finished; not finished, or damaged: page\n" in shown.stdout
    shutil.rmtree(copied.artifact("study"))
    nothing = call("report", str(copied.out))
    assert (nothing.exit_code, nothing.stdout) == (2, "")
    still = "2 of 4 stages are finished; not finished, or damaged: study, page"
    assert nothing.stderr.startswith(f"error: {copied.out}: there is nothing to report yet ({still}); ")
    shutil.rmtree(copied.artifact("sft"))
    assert call("chat", f"{copied.out}:base", "--prompt", "hi", "--max-new-tokens", "2").exit_code == 0
    waiting = call("chat", f"{copied.out}:sft", "--prompt", "hi")
    assert waiting.exit_code == 2
    assert waiting.stderr == (
        f"error: {copied.out}: 'sft' is not finished, or its manifest is damaged; run the recipe again (it has: base)\n"
    )


def test_a_run_that_is_refused_leaves_what_was_there(copied):
    assert copied.run("--quiet", "--set", "data.path=gone.jsonl").exit_code == 2
    assert call("report", str(copied.out)).exit_code == 0


# Folders of other settings


def test_folders_of_other_settings_are_counted_by_a_run_and_named_by_plan(done):
    old = done.artifact("sft")
    unfinished = done.out / "artifacts" / ".work-kd-0123456789ab"
    (unfinished / "checkpoints").mkdir(parents=True)
    (unfinished / "checkpoints" / "state").write_bytes(bytes(2_500_000))
    words = ("--set", "sft.optim.steps=3")
    note = done.run(*words).stderr.splitlines()[-1]
    assert note.startswith("2 folders of other settings, not used by this recipe as it stands, 2.5")
    assert note.endswith("; `potstill plan` with the same recipe, --set and --out names them")
    told = call("plan", done.recipe, "--out", str(done.out), *words).stdout.splitlines()[-3:]
    assert told[0] == f"{note.partition(';')[0]}; to delete:"
    assert told[1] == f"  rm -r {unfinished}  # 2.50 MB, unfinished"
    assert told[2].startswith(f"  rm -r {old}  # ")
    assert old.is_dir()
    assert unfinished.is_dir()
    assert "other settings" not in call("plan", done.recipe, "--out", str(done.folder / "new"), *words).stdout


def test_shared_files_do_not_count_as_gained(done):
    from potstill.run.folder import leftovers

    used, old = done.artifact("sft"), done.artifact("base")
    linked = old / "linked"
    os.link(used / "model.safetensors", linked)
    (left,) = leftovers(done.out, [used])
    own = sum(path.stat().st_size for path in old.rglob("*") if path.is_file() and path != linked)
    assert left.bytes == own


def test_hashes_are_kept_beside_those_of_others(tmp_path):
    file = tmp_path / "hashes.json"
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    one, two = Hashes(file), Hashes(file)
    one.of(tmp_path / "a")
    two.of(tmp_path / "b")
    one.save()
    two.save()
    assert all(Hashes(file).knows(tmp_path / name) for name in ("a", "b"))
