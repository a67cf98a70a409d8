"""Each model is asked in the form of its own chat template, and a teacher never reads another's unless it is told to."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from habits import OPENS_THOUGHT
from tiny_parts import chat_tokenizer, tiny_model, write_rows

from potstill.core.errors import Problem, UserError
from potstill.core.types import Example
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, instruction_pairs
from potstill.edges.models import load_model, load_tokenizer, save_model
from potstill.edges.sampling import generate
from potstill.losses.scoring import mean_nll
from potstill.recipe.parse import parse_recipe
from potstill.run.runner import run_recipe
from potstill.stages.base import answer_problems
from potstill.stages.outlook import Outlook
from potstill.teachers.reading import foreign_form

TOKENS = {"max_tokens": 160, "max_prompt_tokens": 120}
DECODING = {"max_new_tokens": 12}
TURN = "{{ '<|im_start|>' + (%s) + '\\n' + m.content + '%s' }}"
FORM = (
    "{%% for m in messages %%}" + TURN + "{%% endfor %%}{%% if add_generation_prompt %%}{{ '<|im_start|>%s\\n' }}{%% endif %%}"
)
CHATML = FORM % ("m.role", "<|im_end|>", "assistant")
LETTERS = FORM % ("'Q' if m.role == 'user' else 'A'", "<|im_end|>", "A")
OTHER_END = FORM % ("'Q' if m.role == 'user' else 'A'", "<|endoftext|>", "A")


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any) -> Path:
    """Rows, and models of one vocabulary: `chatml` and `twin` of one template, `letters` and `ended` of two others."""
    root = tmp_path_factory.mktemp("forms")
    write_rows(root / "rows.jsonl", 60)
    for seed, (name, template) in enumerate(
        {"chatml": CHATML, "twin": CHATML, "letters": LETTERS, "ended": OTHER_END, "short": CHATML}.items()
    ):
        tokenizer = chat_tokenizer()
        tokenizer.chat_template = template
        if name == "ended":
            tokenizer.eos_token = "<|endoftext|>"
        limit = {"max_position_embeddings": 32} if name == "short" else {}
        save_model(tiny_model("qwen2", len(tokenizer), seed=seed, **limit), tokenizer, root / name)
    return root


def recipe(root: Path, *stages: dict[str, Any], **more: Any) -> Any:
    data = {"kind": "jsonl", "path": str(root / "rows.jsonl"), "context": "context", "splits": {"validation": 0.1, "test": 0.3}}
    return parse_recipe({"name": "forms", "data": data, "prompts": TOKENS, "stage": list(stages), **more})


def study(root: Path, rows: list[tuple[str, str]], **more: Any) -> dict[str, Any]:
    table = [{"name": name, "role": role, "model": f"path:{root / name}"} for name, role in rows]
    metrics = {} if "teacher_reads" in more or more.pop("default", False) else {"metrics": ["rouge_l", "exact_match", "nll"]}
    return {"name": "eval", "kind": "evaluate", "study": table, "decoding": DECODING, **metrics, **more}


def run(root: Path, out: Path, stage: dict[str, Any], **more: Any) -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
    artifact = run_recipe(recipe(root, stage, **more), out)["eval"]
    folder = artifact.folder
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    return json.loads((folder / "study.json").read_text()), answers, artifact.summary


def by_name(found: dict[str, Any]) -> dict[str, str]:
    """Rows of a study without the time that decoding took."""
    return {row["name"]: json.dumps({**row, "decode_tokens_per_s": None}) for row in found["rows"]}


ROWS = [("chatml", "sft"), ("letters", "kd"), ("ended", "teacher"), ("twin", "base")]


@pytest.mark.parametrize("default", [True, False])
def test_the_order_of_a_study_changes_nothing(root: Path, tmp_path: Path, default: bool) -> None:
    first, answers, summary = run(root, tmp_path / "a", study(root, ROWS, default=default))
    orders = [ROWS[::-1], ROWS[1:] + ROWS[:1]]
    for number, rows in enumerate(orders):
        again, theirs, other = run(root, tmp_path / f"b{number}", study(root, rows, default=default))
        assert by_name(again) == by_name(first)
        assert [row["name"] for row in again["rows"]] == [name for name, _ in rows]
        assert {**again, "rows": None} == {**first, "rows": None}
        assert theirs == answers
        assert other == summary


def own_form(root: Path, name: str) -> tuple[list[str], float]:
    """What a model answers, and its nats a token, asked by itself as its template says."""
    where = f"path:{root / name}"
    tokenizer, model = load_tokenizer(where), load_model(where)
    renderer = Renderer(tokenizer, Prompts(**TOKENS))
    (stage,) = recipe(root, study(root, ROWS)).stages
    examples = list(stage.data.examples("test"))
    pairs = list(instruction_pairs(examples, renderer, Counts()))
    asked = [prompt for prompt, _ in pairs]
    answers = generate(model, tokenizer, asked, stop_ids=renderer.stop_ids, max_new_tokens=DECODING["max_new_tokens"])
    return sorted(answers.texts), mean_nll(model, pairs)


def test_each_model_is_asked_in_its_own_form_and_stops_at_its_own_ends(root: Path, tmp_path: Path) -> None:
    found, answers, _ = run(root, tmp_path, study(root, ROWS))
    tokens = sum(found["tokens"])
    for row in found["rows"]:
        expected, nll = own_form(root, row["name"])
        assert sorted(line["answers"][row["name"]][0] for line in answers) == expected
        assert sum(row["scores"]["nll"][0]) / tokens == pytest.approx(nll, rel=1e-5)


def test_a_row_that_does_not_fit_one_model_is_left_out_for_all_and_counted_once(root: Path, tmp_path: Path) -> None:
    long = tmp_path / "long"
    tokenizer = load_tokenizer(f"path:{root / 'chatml'}")
    wordy = "{% if '3' in messages[0].content %}{{ 'amber barley copper draff ester foreshot grist heads' }}{% endif %}"
    tokenizer.chat_template = wordy + CHATML
    save_model(load_model(f"path:{root / 'chatml'}"), tokenizer, long)
    tight = {"max_tokens": 160, "max_prompt_tokens": 30}
    table = study(root, [("chatml", "sft")])
    table["study"].append({"name": "long", "role": "kd", "model": f"path:{long}"})
    found, _, summary = run(root, tmp_path / "both", table, prompts=tight)
    alone, _, of_one = run(root, tmp_path / "one", study(root, [("chatml", "sft")]), prompts=tight)
    lost = summary["dropped"]["prompt too long"] - of_one["dropped"].get("prompt too long", 0)
    assert lost > 0
    assert summary["test_rows"] == of_one["test_rows"] - lost
    kept = {row["key"] for row in found["examples"]}
    scores = dict(zip([row["key"] for row in alone["examples"]], alone["rows"][0]["scores"]["nll"][0], strict=True))
    assert found["rows"][0]["scores"]["nll"][0] == pytest.approx([scores[k] for k in scores if k in kept], rel=1e-5)


def test_kl_of_another_form_is_left_out_with_the_reason(root: Path, tmp_path: Path) -> None:
    found, _, summary = run(
        root, tmp_path, study(root, [("chatml", "sft"), ("letters", "kd"), ("twin", "teacher")], default=True)
    )
    has = {row["name"]: "kl_to_teacher" in row["scores"] for row in found["rows"]}
    assert has == {"chatml": True, "letters": False, "twin": True}
    words = summary["left_out"]["kl_to_teacher"]
    assert list(words) == ["letters"]
    assert words["letters"].startswith("at token 1 of the prompt the student reads ")
    assert "'<|im_start|>Q" in words["letters"]
    assert "'<|im_start|>user" in words["letters"]


def test_kl_of_another_form_that_is_asked_for_is_refused_before_the_cost(root: Path, tmp_path: Path) -> None:
    rows = [("letters", "kd"), ("twin", "teacher")]
    table = study(root, rows, metrics=["rouge_l", "kl_to_teacher"])
    with pytest.raises(UserError, match=r"study\[0\].* kl_to_teacher of letters: .*teacher_reads = 'student'"):
        run_recipe(recipe(root, table), tmp_path)
    assert not list(tmp_path.rglob("partial-*.json"))


def test_on_request_the_teacher_reads_the_students_form_and_the_summary_says_so(root: Path, tmp_path: Path) -> None:
    rows = [("letters", "kd"), ("twin", "teacher")]
    found, _, summary = run(root, tmp_path, study(root, rows, teacher_reads="student"))
    assert all(len(row["scores"]["kl_to_teacher"][0]) == summary["test_rows"] for row in found["rows"])
    assert list(summary["teacher_reads"]) == ["letters"]
    assert summary["left_out"] == {}


def test_a_distance_to_the_teacher_is_refused_as_the_primary_metric(root: Path) -> None:
    with pytest.raises(UserError, match=r"primary = 'kl_to_teacher' compares with the teacher, whose own figure is 0"):
        recipe(root, study(root, [("letters", "kd"), ("twin", "teacher")], default=True, primary="kl_to_teacher"))


def test_two_teachers_in_one_study_are_refused(root: Path) -> None:
    with pytest.raises(UserError, match="'chatml' and 'twin' both have role = 'teacher'"):
        recipe(root, study(root, [("chatml", "teacher"), ("twin", "teacher")]))


def kd(root: Path, student: str, teacher: str, **more: Any) -> dict[str, Any]:
    quiet = {"optim": {"steps": 2, "batch_size": 4}, "validation": {"times": 0}}
    return (
        {"name": "kd", "kind": "distill", "student": f"path:{root / student}", "teacher": f"path:{root / teacher}"}
        | quiet
        | more
    )


@pytest.mark.parametrize("teacher", ["letters", "ended"])
@pytest.mark.parametrize("signal", ["hidden", "live"])
def test_a_teacher_of_another_form_is_refused_or_told_of(root: Path, tmp_path: Path, teacher: str, signal: str) -> None:
    with pytest.raises(
        UserError, match=r"kd\.teacher  teacher and student read the rows in different forms: at token 1 of the prompt"
    ):
        run_recipe(recipe(root, kd(root, "chatml", teacher, signal=signal)), tmp_path / "refused")
    done = run_recipe(recipe(root, kd(root, "chatml", teacher, signal=signal, teacher_reads="student")), tmp_path / "forced")[
        "kd"
    ]
    assert done.summary["teacher_reads"].startswith("at token 1 of the prompt")
    done = run_recipe(recipe(root, kd(root, "chatml", "twin", signal=signal)), tmp_path / "same")["kd"]
    assert done.summary["teacher_reads"] is None


def test_templates_that_render_the_rows_alike_are_one_form(root: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(f"path:{root / 'twin'}")
    tokenizer.chat_template = "{# the same, with a remark #}" + CHATML
    save_model(load_model(f"path:{root / 'twin'}"), tokenizer, tmp_path / "twin")
    done = run_recipe(recipe(root, kd(root, "chatml", "twin") | {"teacher": f"path:{tmp_path / 'twin'}"}), tmp_path / "out")[
        "kd"
    ]
    assert done.summary["teacher_reads"] is None


def test_a_cache_is_of_the_teachers_own_form(root: Path) -> None:
    with pytest.raises(UserError, match="a cache holds rows in the teacher's own form"):
        recipe(
            root,
            {"name": "said", "kind": "cache", "teacher": f"path:{root / 'letters'}"},
            kd(root, "chatml", "letters", cache="stage:said", teacher_reads="student"),
        )


# Positions


@pytest.mark.parametrize("signal", ["hidden", "live"])
def test_a_teacher_with_fewer_positions_than_the_rows_is_refused_with_numbers(root: Path, tmp_path: Path, signal: str) -> None:
    with pytest.raises(
        UserError, match=r"kd\.prompts\.max_tokens = 160  a row has \d\d tokens, and the teacher path:\S+ has 32 positions"
    ):
        run_recipe(recipe(root, kd(root, "chatml", "short", signal=signal)), tmp_path)


def test_a_cache_of_a_teacher_with_fewer_positions_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"said\.prompts\.max_tokens = 160  a row has \d\d tokens, and path:\S+ has 32 positions"
    ):
        run_recipe(recipe(root, {"name": "said", "kind": "cache", "teacher": f"path:{root / 'short'}"}), tmp_path)


@pytest.mark.parametrize(
    ("student", "teacher", "who"), [("brief", "twin", r"path:\S+brief"), ("chatml", "brief", r"the teacher path:\S+brief")]
)
def test_validation_answers_past_the_positions_are_found_before_anything_runs(
    root: Path, tmp_path: Path, student: str, teacher: str, who: str
) -> None:
    tokenizer = load_tokenizer(f"path:{root / 'chatml'}")
    save_model(tiny_model("qwen2", len(tokenizer), max_position_embeddings=160), tokenizer, tmp_path / "brief")
    where = {name: f"path:{(tmp_path if name == 'brief' else root) / name}" for name in (student, teacher)}
    stage = kd(root, student, teacher, signal="live") | {"student": where[student], "teacher": where[teacher]}

    def found(**validation: Any) -> list[Problem]:
        made = recipe(root, stage | {"validation": {"metrics": ["nll", "kl_on_answers"], "max_new_tokens": 140} | validation})
        return [problem for problem in made.stages[0].problems(Outlook()) if problem.place == "validation.max_new_tokens"]

    (problem,) = found()
    most = re.search(rf"^a prompt of \d\d tokens .*, and {who} has 160 positions; set it to at most (\d+)", problem.rule)
    assert most is not None
    assert len(found(max_new_tokens=int(most[1]) + 1)) == 1
    assert not found(max_new_tokens=int(most[1]))
    assert not found(max_new_tokens=int(most[1]) + 1, rows=1), "the longest prompt is not drawn"
    assert found(max_new_tokens=159, rows=1)
    assert not found(times=0)
    assert not found(metrics=["nll"])


def test_a_prompt_that_fills_the_positions_is_no_matter_of_the_answers_length() -> None:
    for new, remedy in ((40, "set it to at most 216"), (256, "lower it, and samples.max_new_tokens = 256 too")):
        (problem,) = answer_problems("samples.max_new_tokens", new, 300, 256, "m")
        assert problem.place == "prompts.max_prompt_tokens"
        assert problem.rule == f"a prompt has 300 tokens, and m 256 positions, which leave none for an answer; {remedy}"
    assert not [*answer_problems("samples.max_new_tokens", 40, 216, 256, "m")]
    assert not [*answer_problems("samples.max_new_tokens", 40, 300, None, "m")]


def test_a_study_refuses_short_models_before_it_loads_any(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"eval\.study\[1\]\.model = \S+  short: a row has \d\d tokens and the model 32 positions"
    ):
        run_recipe(recipe(root, study(root, [("chatml", "sft"), ("short", "kd")])), tmp_path / "rows")
    table = study(root, [("chatml", "sft"), ("twin", "kd")], decoding={"max_new_tokens": 250})
    with pytest.raises(
        UserError, match=r"chatml: a prompt of \d\d tokens .* decoding.max_new_tokens = 250 are more than .* 256"
    ):
        run_recipe(recipe(root, table), tmp_path / "answers")
    assert not list(tmp_path.rglob("partial-*.json"))


def test_models_of_other_tokenizers_are_compared_by_text_and_by_its_bytes(root: Path, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(330)
    save_model(tiny_model("qwen2", len(tokenizer)), tokenizer, tmp_path / "small")
    rows = [{"name": "a", "model": f"path:{root / 'chatml'}"}, {"name": "b", "model": f"path:{tmp_path / 'small'}"}]
    table = {"name": "eval", "kind": "evaluate", "study": rows, "decoding": DECODING}
    asked = {**table, "study": [{**rows[0], "role": "teacher"}, rows[1]], "metrics": ["rouge_l", "kl_to_teacher"]}
    with pytest.raises(
        UserError, match=r"eval\.metrics  kl_to_teacher compares token by token, and b and a have different tok"
    ):
        run_recipe(recipe(root, asked), tmp_path / "out")
    found = run_recipe(recipe(root, {**table, "metrics": ["rouge_l", "nll"]}), tmp_path / "out")["eval"]
    study = json.loads((found.folder / "study.json").read_text())
    assert set(study["rows"][1]["scores"]) == {"rouge_l", "nll"}
    assert study["metrics"][1]["over"] == "bytes"


def test_a_speed_past_the_positions_is_refused_by_its_own_field(root: Path, tmp_path: Path) -> None:
    speed = {"kind": "decode_speed", "new_tokens": 255}
    table = study(root, [("chatml", "base")], metrics=["rouge_l", speed])
    with pytest.raises(UserError, match=r"decode_speed.new_tokens = 255 is too much for 256 positions; set it to at most 252"):
        run_recipe(recipe(root, table), tmp_path)
    assert not list(tmp_path.glob("artifacts/*"))


@pytest.mark.parametrize(
    ("formats", "told"),
    [
        (["gguf"], "The weights were rounded from float32: to float16 in `model-f16.gguf`. The figures below are of the model"),
        ([{"kind": "safetensors", "dtype": "bfloat16"}], "to bfloat16 in `model.safetensors`"),
        (["safetensors"], ""),
    ],
)
def test_the_card_says_where_its_files_are_rounded(root: Path, tmp_path: Path, formats: list[Any], told: str) -> None:
    measured = study(root, [("chatml", "base")], metrics=["rouge_l"])
    export = {"name": "export", "kind": "export", "model": f"path:{root / 'chatml'}", "study": "stage:eval", "formats": formats}
    card = (run_recipe(recipe(root, measured, export), tmp_path)["export"].folder / "README.md").read_text()
    assert told in card
    assert ("before that rounding" in card) == bool(told)


def test_a_card_without_figures_and_files_written_twice_are_refused_first(root: Path, tmp_path: Path) -> None:
    measured = study(root, [("chatml", "base")], metrics=["rouge_l"])
    export = {"name": "export", "kind": "export", "model": f"path:{root / 'twin'}", "study": "stage:eval"}
    twice = [{"kind": "gguf"}, {"kind": "gguf", "types": ["f16"]}]
    with pytest.raises(UserError) as refused:
        run_recipe(recipe(root, measured, {**export, "formats": twice}), tmp_path)
    assert "does not measure path:" in str(refused.value)
    assert "two of them write model-f16.gguf" in str(refused.value)
    assert not list(tmp_path.glob("artifacts/*"))


def test_a_row_that_the_teachers_form_leaves_out_is_told_with_the_reason() -> None:
    """Its template reads a tag in the row, which has nothing to do with length."""
    student, teacher = chat_tokenizer(), chat_tokenizer()
    student.chat_template = teacher.chat_template = CHATML
    for tokenizer in (student, teacher):
        tokenizer.add_tokens(["<think>", "</think>"])
    teacher.chat_template = OPENS_THOUGHT
    row = Example("k", "Say peat.", "Peat.")
    words = foreign_form(student, teacher, Prompts(thinking="keep"), [row], "student", "kd")
    assert words is not None
    assert words.endswith("leaves out a row that the student's form has: no reasoning, where the prompt opens <think>")
