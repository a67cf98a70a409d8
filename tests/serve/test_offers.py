"""Which models of a run are offered, by which names and files."""

import json

import pytest

from potstill.core.artifact import Artifact, file_hash
from potstill.core.errors import UserError
from potstill.serve.offers import checked, offers_of, picked

PROMPTS = {"format": "chat", "system": "Short."}


@pytest.fixture
def run(tmp_path):
    """A finished run as it lies on disk: base, two seeds of a student, its four-bit form, two exports, a study."""
    folder = tmp_path / "run"
    listed = {}

    def add(name, kind, makes, *, parents=(), files=(), **stage):
        work = folder / "artifacts" / f".work-{name}"
        work.mkdir(parents=True)
        for file in ("weights", *files):
            (work / file).write_text(name)
        stage = {"kind": kind, "name": name.partition("@")[0], "prompts": PROMPTS, **stage}
        made = {parent: f"print-{parent}" for parent in parents}
        of = folder / "artifacts" / f"{name}-1"
        Artifact(of, name, kind, makes, f"print-{name}", made, stage=stage).commit(work)
        listed[name] = of.name
        (folder / "run.json").write_text(json.dumps(listed))
        return of

    add("base", "pretrain", "model")
    add("tutor", "sft", "model", parents=["base"], model="stage:base")
    for seed in (1, 2):
        add(f"kd@{seed}", "distill", "model", parents=["base", "tutor"], model="stage:base", teacher="stage:tutor")
    add("small", "quantize", "model", parents=["kd@1"], model="stage:kd")
    add(
        "phone", "export", "export", parents=["small"], model="stage:small", files=["model-q4_0.gguf", "model-q4_0-as-f16.gguf"]
    )
    add("wide", "export", "export", parents=["kd@1"], model="stage:kd", files=["model-f32.gguf", "model-f16.gguf"])
    return folder, add


def test_a_run_without_a_study_offers_its_models_by_what_they_are(run):
    folder, _ = run
    found = offers_of(f"{folder}:small")
    assert [(offer.id, offer.role) for offer in found] == [
        ("small", "quantized"),
        ("base", "base"),
        ("kd", "kd"),
        ("tutor", "teacher"),
    ]
    files = {offer.id: offer.file and offer.file.name for offer in found}
    assert files == {"small": "model-q4_0.gguf", "base": None, "kd": "model-f16.gguf", "tutor": None}
    assert found[2].where.endswith("kd@1-1")  # the first seed
    assert picked(found, []) == ["base", "kd", "small", "tutor"]


def test_a_study_names_its_models_and_how_they_are_asked(run):
    folder, add = run
    rows = [
        {"name": "As it came", "model": "hf:some/model", "role": "base"},
        {"name": "Distilled", "model": "stage:kd", "role": "kd"},
        {"name": "4 bits", "model": "stage:small", "role": "quantized"},
        {"name": "Never made", "model": "stage:lost", "role": "other"},
        {"name": "Tutor", "model": "stage:tutor", "role": "teacher"},
    ]
    add("study", "evaluate", "evaluation", study=rows)
    found = offers_of(f"{folder}:kd")
    assert [(offer.id, offer.title) for offer in found] == [
        ("kd", "Distilled"),
        ("as-it-came", "As it came"),
        ("small", "4 bits"),
        ("tutor", "Tutor"),
    ]
    assert found[1].prompts.system == "Short."
    assert picked(found, ["4 bits", "tutor"]) == ["small", "tutor"]
    with pytest.raises(UserError, match="no model 'smal'; did you mean 'small'"):
        picked(found, ["smal"])


def test_a_file_that_was_changed_since_its_export_is_not_opened(run):
    folder, _ = run
    offer = offers_of(f"{folder}:small")[0]
    assert offer.file is not None
    assert checked(offer, file=True) is offer
    raw = bytearray(offer.file.read_bytes())
    raw[2] ^= 1
    offer.file.write_bytes(raw)
    with pytest.raises(UserError, match=r"phone is damaged: .*model-q4_0\.gguf"):
        checked(offer, file=True)
    assert checked(offer, file=False) is offer  # torch reads the model's own files


def test_a_file_that_failed_its_verification_is_not_served(run):
    folder, _ = run
    (wide,) = folder.glob("artifacts/wide-*")
    record = {"files": [{"file": "model-f16.gguf", "passed": False, "why": "its vocabulary differs"}]}
    (wide / "verify.json").write_text(json.dumps(record))
    (other,) = wide.glob("model-f32.gguf")
    assert offers_of(f"{folder}:kd")[0].file == other
    record["files"].append({"file": "model-f32.gguf", "passed": False})
    (wide / "verify.json").write_text(json.dumps(record))
    assert offers_of(f"{folder}:kd")[0].file is None


def test_no_two_models_have_the_same_id(run):
    folder, add = run
    rows = [
        {"name": "Small", "model": "hf:some/model", "role": "base"},
        {"name": "Kd 2", "model": "hf:some/other", "role": "base"},
        {"name": "Distilled", "model": "stage:kd", "role": "kd"},
        {"name": "4 bits", "model": "stage:small", "role": "quantized"},
    ]
    add("study", "evaluate", "evaluation", study=rows)
    found = offers_of(f"{folder}:kd@2")
    ids = {offer.id: offer.where.rpartition("/")[2] for offer in found}
    assert ids == {"kd": "kd@2-1", "small-2": "model", "kd-2": "other", "kd-3": "kd@1-1", "small": "small-1"}


def test_a_file_that_differs_from_the_manifest_beside_it_is_not_served(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "model.gguf").write_bytes(b"GGUF and more")
    listed = {"model.gguf": [13, file_hash(work / "model.gguf")]}
    Artifact(tmp_path / "out", "export", "export", "export", "print", summary={"files": listed}).commit(work)
    file = tmp_path / "out" / "model.gguf"
    (offer,) = offers_of(str(file))
    assert checked(offer, file=True) is offer
    file.write_bytes(b"GGUF and mora")
    for by_llamacpp in (True, False):
        with pytest.raises(UserError, match=r"model\.gguf has the right size and another content.*export the model again"):
            checked(offer, file=by_llamacpp)
    file.write_bytes(b"GGUF")
    with pytest.raises(UserError, match="has 4 bytes instead of 13"):
        checked(offer, file=True)
    (tmp_path / "out" / "artifact.json").unlink()
    assert checked(offer, file=True) is offer, "nothing says what it was"
