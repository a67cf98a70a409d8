"""What a teacher said is computed once and shared; what does not fit is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_parts import chat_tokenizer, tiny_model, write_rows

import potstill
from potstill.commands.plan import estimate
from potstill.core.artifact import Artifact
from potstill.core.errors import Interrupted, RecipeError, UserError
from potstill.edges.models import load_head, load_model, save_model
from potstill.recipe.parse import parse_recipe
from potstill.run.runner import run_recipe
from potstill.stages.base import Context
from potstill.stages.cache import Cache
from potstill.teachers.teacher import Teacher
from potstill.train.work import Work

QUIET = {"times": 0}
OPTIM = {"epochs": 2, "batch_size": 8, "lr": 3e-3}
PROMPTS = {"max_tokens": 250, "max_prompt_tokens": 200}
ROWS = 48  # of 60; the rest are held out


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any) -> Path:
    """A teacher, a student and rows."""
    folder = tmp_path_factory.mktemp("root")
    tokenizer = chat_tokenizer()
    for name, width, seed in (("teacher", 64, 1), ("student", 32, 2)):
        save_model(tiny_model("qwen2", len(tokenizer), width=width, seed=seed), tokenizer, folder / name)
    write_rows(folder / "rows.jsonl")
    return folder


def data(root: Path, **more: Any) -> dict[str, Any]:
    return {"kind": "jsonl", "path": str(root / "rows.jsonl"), "splits": {"validation": 0.1, "test": 0.1}, **more}


def kd(root: Path, **more: Any) -> dict[str, Any]:
    student, teacher = f"path:{root}/student", f"path:{root}/teacher"
    return {"kind": "distill", "student": student, "teacher": teacher, "optim": OPTIM, "validation": QUIET, **more}


def recipe(root: Path, *stages: dict[str, Any], **more: Any) -> Any:
    return parse_recipe({"name": "shared", "data": data(root), "prompts": PROMPTS, "stage": list(stages), **more})


def alone(root: Path, **more: Any) -> potstill.Distill:
    (stage,) = recipe(root, kd(root, name="kd", **more)).stages
    return stage


def signal(artifact: Artifact) -> dict[str, Any]:
    return artifact.summary["signal"]


def test_seeds_divergences_and_temperatures_share_what_the_teacher_said(root: Path, tmp_path: Path) -> None:
    stages = [
        kd(root, name="forward", per_seed=True),
        kd(root, name="reverse", divergence="reverse_kl", temperature=2.0),
        kd(root, name="live", signal="live"),
    ]
    done = run_recipe(recipe(root, *stages, seeds=[1, 2]), tmp_path)
    rows = done["forward@1"].summary["data"]["rows"]
    assert signal(done["forward@1"])["rows_computed"] == rows, "once each, though one step sees the same row twice"
    for name in ("forward@2", "reverse"):
        assert (signal(done[name])["rows_computed"], signal(done[name])["rows_read"]) == (0, 2 * rows)
    assert signal(done["live"]) == {"kept": "live"}
    assert len(list((tmp_path / "teacher-cache").iterdir())) == 1
    tokens = done["forward@1"].summary["data"]["response_tokens"]
    assert signal(done["reverse"])["bytes"] == pytest.approx(2 * 64 * tokens, rel=0.2)


def test_what_a_teacher_said_by_other_mathematics_is_not_read_back(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(root, kd(root, name="kept"))
    rows = signal(run_recipe(asked, tmp_path)["kept"])["rows_computed"]
    for module in ("fingerprints", "runner"):
        monkeypatch.setattr(f"potstill.run.{module}.CODE", 1_000)
    assert signal(run_recipe(asked, tmp_path)["kept"])["rows_computed"] == rows > 0


def test_live_and_kept_differ_by_a_rounding_only(root: Path, tmp_path: Path) -> None:
    done = run_recipe(recipe(root, kd(root, name="kept"), kd(root, name="live", signal="live")), tmp_path)
    curves = [[json.loads(line) for line in (a.folder / "metrics.jsonl").read_text().splitlines()] for a in done.values()]
    for kept, live in zip(*curves, strict=True):
        assert kept["divergence"] == pytest.approx(live["divergence"], rel=1e-2)
        assert kept["ce"] == pytest.approx(live["ce"], rel=1e-2)
    assert curves[0] != curves[1]


@pytest.mark.parametrize("form", [{}, {"signal": "topk", "top_k": 7}])
def test_a_cache_built_ahead_serves_many(root: Path, tmp_path: Path, form: dict[str, Any]) -> None:
    said = {"name": "said", "kind": "cache", "teacher": f"path:{root}/teacher", **form}
    stages = [said, kd(root, name="one", cache="stage:said"), kd(root, name="two", cache="stage:said", ratio=0.9)]
    done = run_recipe(recipe(root, *stages), tmp_path)
    assert done["said"].summary["rows_computed"] == done["said"].summary["rows"]
    for name in ("one", "two"):
        assert signal(done[name])["rows_computed"] == 0
        assert signal(done[name])["kept"] == form.get("signal", "hidden")
        assert signal(done[name])["bytes"] == done["said"].summary["bytes"]
    assert not (tmp_path / "teacher-cache").exists()


@pytest.fixture(scope="module")
def built(root: Path, tmp_path_factory: Any) -> Artifact:
    (stage,) = recipe(root, {"name": "said", "kind": "cache", "teacher": f"path:{root}/teacher"}).stages
    return potstill.run_stage(stage, into=tmp_path_factory.mktemp("built") / "said")


def refused(stage: potstill.Distill, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        potstill.run_stage(stage, into=tmp_path / "kd")
    assert not (tmp_path / "kd").exists()
    return str(caught.value)


def test_a_teacher_that_moved_under_its_cache_is_refused(root: Path, built: Artifact, tmp_path: Path) -> None:
    moved = tmp_path / "teacher"
    tokenizer = chat_tokenizer()
    save_model(tiny_model("qwen2", len(tokenizer), width=64, seed=9), tokenizer, moved)
    told = refused(alone(root, teacher=f"path:{moved}", cache=f"path:{built.folder}"), tmp_path)
    wanted = "the cache 'said' does not fit: another teacher said it: its weights or tokenizer are others; "
    assert told == wanted + "build another one, or leave out `cache`"
    other = refused(alone(root, teacher_precision="int8", cache=f"path:{built.folder}"), tmp_path)
    assert "does not fit: its precision is float32, and int8 of float32 is asked for; " in other


def test_other_prompts_are_refused_with_what_differs(root: Path, built: Artifact, tmp_path: Path) -> None:
    stage = alone(root, cache=f"path:{built.folder}", prompts={**PROMPTS, "system": "Be brief."})
    told = refused(stage, tmp_path)
    assert told.startswith(
        f"the cache 'said' lacks {built.summary['rows']} of {built.summary['rows']} rows (prompts.system is "
    )
    assert told.endswith("build it with the same data, prompts and tokenizer, or leave out `cache`")


def test_more_rows_are_refused_and_fewer_are_not(root: Path, built: Artifact, tmp_path: Path) -> None:
    more = alone(root, cache=f"path:{built.folder}", data=data(root, splits={"validation": 0.1, "test": 0.0}))
    assert "data.splits is " in refused(more, tmp_path)
    fewer = alone(root, cache=f"path:{built.folder}", data=data(root, share=0.5))
    assert signal(potstill.run_stage(fewer, into=tmp_path / "kd"))["rows_computed"] == 0


def test_of_a_damaged_cache_only_the_lost_rows_are_computed_again(root: Path, built: Artifact, tmp_path: Path) -> None:
    (values,) = built.folder.rglob("*.values")
    whole = values.read_bytes()
    values.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    found = signal(potstill.run_stage(alone(root, cache=f"path:{built.folder}"), into=tmp_path / "kd"))
    assert (found["rows_computed"], found["rows_damaged"]) == (1, 1)
    values.write_bytes(values.read_bytes()[: len(whole) // 2])
    found = signal(potstill.run_stage(alone(root, cache=f"path:{built.folder}"), into=tmp_path / "kd2"))
    assert 1 < found["rows_computed"] < built.summary["rows"]
    again = signal(potstill.run_stage(alone(root, cache=f"path:{built.folder}"), into=tmp_path / "kd3"))
    assert again["rows_computed"] == 0


def test_a_cache_without_its_description_is_refused(root: Path, built: Artifact, tmp_path: Path) -> None:
    (about,) = built.folder.rglob("cache.json")
    text = about.read_text()
    about.unlink()
    told = refused(alone(root, cache=f"path:{built.folder}"), tmp_path)
    assert "has lost its cache.json; delete " in told
    about.write_text(text[:-9])
    assert "cache.json: damaged; delete " in refused(alone(root, cache=f"path:{built.folder}"), tmp_path)
    about.write_text(text)


def test_an_interrupted_cache_goes_on(root: Path, tmp_path: Path) -> None:
    said = {"name": "said", "kind": "cache", "teacher": f"path:{root}/teacher", "micro_batch_tokens": 300}
    (stage,) = recipe(root, said).stages
    assert isinstance(stage, Cache)
    calls = iter(range(100))
    with pytest.raises(Interrupted, match=r"^said: stopped after \d+ of \d+ rows; run the same command again to go on"):
        stage.run(Context(Work(tmp_path / "work", "said", stop_requested=lambda: next(calls) == 1)))
    found = stage.run(Context(Work(tmp_path / "work", "said")))
    assert 0 < found["rows_read"] < found["rows"]
    assert found["rows_read"] + found["rows_computed"] == found["rows"]


@pytest.mark.parametrize("kind", ["cache", "distill"])
def test_more_tokens_than_there_are_cannot_be_kept(root: Path, tmp_path: Path, kind: str) -> None:
    form = {"signal": "topk", "top_k": 10_000}
    stage = kd(root, name="x", **form) if kind == "distill" else {"name": "x", "kind": "cache", **form}
    (parsed,) = recipe(root, stage | {"teacher": f"path:{root}/teacher"}).stages
    with pytest.raises(UserError, match=r"x\.top_k = 10000  is more than the \d+ tokens of the vocabulary; lower it$"):
        potstill.run_stage(parsed, into=tmp_path / "x")


def test_a_teacher_with_fewer_embeddings_than_tokens_is_refused(root: Path, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    save_model(tiny_model("qwen2", len(tokenizer) - 5, width=64), tokenizer, tmp_path / "short")
    assert "the tokenizer has" in refused(alone(root, teacher=f"path:{tmp_path}/short"), tmp_path)


def test_what_two_stages_can_tell_is_told_at_check(root: Path) -> None:
    said = {"name": "said", "kind": "cache", "teacher": f"path:{root}/teacher", "signal": "topk", "top_k": 9}
    other = {"temperature": 2.0, "teacher": f"path:{root}/student", "teacher_precision": "int8", "prompts": {"max_tokens": 240}}
    with pytest.raises(RecipeError) as caught:
        recipe(root, said, kd(root, name="kd", cache="stage:said", **other))
    places = [problem.place for problem in caught.value.problems]
    assert sorted(places) == sorted(f"kd.{name}" for name in ("teacher", "temperature", "teacher_precision", "prompts"))
    assert "the cache 'said' was made for 1; give both the same" in str(caught.value)


def test_a_model_is_no_cache(root: Path, tmp_path: Path) -> None:
    done = potstill.run_stage(alone(root), into=tmp_path / "done")
    told = refused(alone(root, cache=f"path:{done.folder}"), tmp_path)
    assert told.endswith(f"{done.folder} holds model; name the artifact folder that a cache stage made")


def test_top_k_without_topk_is_told(root: Path) -> None:
    for stage in (kd(root, name="x", top_k=9), {"name": "x", "kind": "cache", "teacher": f"path:{root}/teacher", "top_k": 9}):
        with pytest.raises(UserError, match="top_k is for signal = 'topk'; set that too, or leave top_k out"):
            recipe(root, stage)


def test_a_cache_brings_its_own_form(root: Path) -> None:
    with pytest.raises(UserError, match="the cache brings its own signal and top_k; set them there"):
        alone(root, cache="path:.", signal="topk")


def test_whatever_decides_the_values_decides_the_identity(root: Path, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    save_model(tiny_model("qwen2", len(tokenizer), width=64, seed=5), tokenizer, tmp_path / "other")
    one = {"where": f"path:{root}/teacher", "precision": "fp32", "bf16": False, "vocab": 300, "code": 9}
    form = {"kept": "topk", "top_k": 8, "temperature": 1.0}
    changes = [
        {"where": f"path:{tmp_path}/other"},
        {"precision": "int8"},
        {"precision": "bf16"},
        {"bf16": True},
        {"vocab": 299},
        {"code": 10},
        {"kept": "hidden"},
        {"top_k": 9},
        {"temperature": 2.0},
    ]

    def identity(change: dict[str, Any]) -> str:
        fields = {**one, **form, **change}
        teacher = Teacher(**{name: fields[name] for name in one}, say=print)
        return json.dumps(teacher.identity(**{name: fields[name] for name in form}), sort_keys=True)

    found = [identity({}), *(identity(change) for change in changes)]
    assert len(set(found)) == len(found)
    kept = [identity({"kept": "hidden", **change}) for change in ({}, {"top_k": 9}, {"temperature": 2.0}, {"vocab": 299})]
    assert len(set(kept)) == 1, "hidden states serve every temperature and vocabulary"


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_alone_is_the_models_head(family: str, tied: bool, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    save_model(tiny_model(family, len(tokenizer), tie_word_embeddings=tied), tokenizer, tmp_path)
    where = f"path:{tmp_path}"
    head, form = load_head(where)
    assert form.plain
    assert head.weight.equal(load_model(where).get_output_embeddings().weight)
    assert not head.weight.requires_grad


def test_the_plan_counts_what_is_kept_once(root: Path, tmp_path: Path) -> None:
    stages = [kd(root, name="one"), kd(root, name="two", ratio=0.9), kd(root, name="live", signal="live")]
    stages.append({"name": "said", "kind": "cache", "teacher": f"path:{root}/teacher", "signal": "topk", "top_k": 8})
    one, two, live, said = (line.json() for line in estimate(recipe(root, *stages), tmp_path, measure=False).lines)
    assert one["cache_bytes"] > 0
    assert two["cache_bytes"] is None
    assert live["cache_bytes"] is None
    assert said["cache_bytes"] == pytest.approx(one["cache_bytes"] * (8 * 8 + 4) / (2 * 64), rel=0.01)
    assert two["flops"] < one["flops"] < live["flops"]
