"""Rows that a teacher writes: by whom, which, how a run goes on, and what is learned from them."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_parts import gpt2_tokenizer, save_pair, tiny_model, write_rows

from potstill.commands.plan import estimate
from potstill.core.artifact import Artifact
from potstill.core.errors import RecipeError, UserError
from potstill.data.prompts import Prompts, Renderer
from potstill.edges.models import load_model, load_tokenizer, save_model
from potstill.recipe.parse import parse_recipe
from potstill.rollouts.journal import Answer, Journal
from potstill.run.runner import run_recipe
from potstill.sources import Source
from potstill.sources.jsonl import Jsonl
from potstill.stages.known import question_hashes, trained_rows
from potstill.study.records import Trained

OPTIM = {"steps": 3, "batch_size": 4, "lr": 1e-3}
QUIET = {"times": 1, "rows": 4, "max_new_tokens": 4}
OPEN = {"finished": False, "repetition": False}  # random models do not end


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    save_pair(folder)
    write_rows(folder / "rows.jsonl")
    return folder


def data(root: Path) -> dict[str, Any]:
    splits = {"validation": 0.2, "test": 0.3}
    return {"kind": "jsonl", "path": str(root / "rows.jsonl"), "language": "en", "context": "context", "splits": splits}


def table(root: Path, *stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    prompts = {"max_tokens": 128, "max_prompt_tokens": 96}
    return {"name": "written", "data": data(root), "prompts": prompts, "stage": list(stages), **more}


def generate(root: Path, **more: Any) -> dict[str, Any]:
    written = {"name": "written", "kind": "generate", "model": f"path:{root}/teacher", "filters": OPEN}
    return written | {"sampling": {"temperature": 0, "max_new_tokens": 8}} | more


def sft(root: Path, **more: Any) -> dict[str, Any]:
    student = {"name": "sft", "kind": "sft", "model": f"path:{root}/student", "data": "stage:written"}
    return student | {"optim": OPTIM, "validation": QUIET} | more


def run(root: Path, out: Path, *stages: dict[str, Any], **more: Any) -> dict[str, Artifact]:
    return run_recipe(parse_recipe(table(root, *stages, **more)), out)


def lines(artifact: Artifact, name: str = "rows.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (artifact.folder / name).read_text(encoding="utf-8").splitlines()]


def questions(rows: Sequence[Any]) -> list[str]:
    return [row["instruction"] if isinstance(row, dict) else row.instruction for row in rows]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of runs that take up what others have written."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="module")
def made(root: Path, out: Path) -> dict[str, Artifact]:
    return run(root, out, generate(root), sft(root), sft(root, name="control", data=data(root)))


@pytest.fixture(scope="module")
def journal(out: Path, made: dict[str, Artifact]) -> Path:
    (found,) = (out / "written").iterdir()
    return found


@pytest.fixture(scope="module")
def sampled(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    hot = {"samples": 3, "sampling": {"temperature": 1.5, "max_new_tokens": 6}}
    best = generate(root, name="best", filters={**OPEN, "best": "likelihood"}, **hot)
    return run(root, tmp_path_factory.mktemp("sampled"), generate(root, **hot), best)


def test_answers_are_the_teachers_own(root: Path, made: dict[str, Artifact]) -> None:
    """Against transformers' own generate and forward, one row at a time."""
    teacher, tokenizer = load_model(f"path:{root}/teacher"), load_tokenizer(f"path:{root}/teacher")
    source = Source.parse(data(root))
    assert isinstance(source, Source)
    renderer = Renderer(tokenizer, Prompts(max_tokens=128, max_prompt_tokens=96))
    rows = lines(made["written"])
    assert questions(rows) == questions([*source.examples("train")])
    for row, example in [*zip(rows, source.examples("train"), strict=True)][:6]:
        assert (row["key"], row.get("context", ""), row["language"]) == (example.key, example.context, example.language)
        ids_1T = torch.tensor([renderer.prompt(example).ids])
        width = ids_1T.shape[1]
        with torch.inference_mode():
            all_1T = teacher.generate(ids_1T, max_new_tokens=8, do_sample=False, eos_token_id=renderer.stop_ids, pad_token_id=0)
            logp_TV = teacher(all_1T).logits[0, width - 1 : -1].log_softmax(-1)
        new_N = all_1T[0, width:]
        assert row["response"] == tokenizer.decode(new_N, skip_special_tokens=True).strip()
        assert row["written"]["tokens"] == len(new_N)
        mean = logp_TV.gather(-1, new_N[:, None]).mean().item()
        assert row["written"]["mean_logp"] == pytest.approx(mean, abs=1e-5)
        assert row["written"]["teacher"] == f"path:{root}/teacher"
        assert row["written"]["sampling"]["max_new_tokens"] == 8


def test_what_is_learned_is_what_was_written(root: Path, made: dict[str, Artifact]) -> None:
    source = Source.parse(f"path:{made['written'].folder}")
    assert isinstance(source, Source)
    own = Source.parse(data(root))
    assert isinstance(own, Source)
    assert [row.response for row in source.examples("train")] == [row["response"] for row in lines(made["written"])]
    assert not {row.response for row in source.examples("train")} & {row.response for row in own.examples("train")}
    for split in ("validation", "test"):  # the source's own, so that nothing that was asked leaks into them
        assert [*source.examples(split)] == [*own.examples(split)] != []
    asked = np.unique(question_hashes(own.examples("train")))
    assert (trained_rows(made["sft"].folder) == asked).all()
    trained = Trained.model_validate(made["sft"].summary["trained"])
    assert trained.teacher == f"path:{root}/teacher"
    control = Trained.model_validate(made["control"].summary["trained"])
    assert (control.data, control.teacher) == (trained.data, None)  # the same questions, other answers


def test_any_reader_of_json_lines_reads_the_rows(made: dict[str, Artifact]) -> None:
    source = Jsonl(path=str(made["written"].folder / "rows.jsonl"), context="context", key="key", language_column="language")
    assert [row.response for row in source.rows()] == [row["response"] for row in lines(made["written"])]


def test_a_student_with_another_tokenizer_learns(root: Path, made: dict[str, Artifact], out: Path, tmp_path: Path) -> None:
    tokenizer = gpt2_tokenizer(300)
    save_model(tiny_model("gpt2", len(tokenizer)), tokenizer, tmp_path / "gpt2")
    prompts = {"format": "alpaca", "max_tokens": 200, "max_prompt_tokens": 180}
    student = sft(root, model=f"path:{tmp_path}/gpt2", prompts=prompts, optim=OPTIM | {"steps": 12}, validation={"times": 0})
    done = run(root, out, generate(root), student)
    losses = [json.loads(line)["loss"] for line in (done["sft"].folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    preview = "".join(token for token, learned in done["sft"].summary["data"]["mask_preview"] if learned)
    assert lines(done["written"])[0]["response"].split()[0][:2] in preview


def test_samples_differ_and_count(sampled: dict[str, Artifact]) -> None:
    every = sampled["written"]
    rows = lines(every)
    assert every.summary["answers"] == 75
    assert every.summary["rows"] + sum(every.summary["filtered"].values()) == 75
    assert len(rows) + len(lines(every, "left_out.jsonl")) == 75
    assert {row["written"]["sample"] for row in rows} == {0, 1, 2}
    assert len({row["response"] for row in rows}) > 60
    logp = [row["written"]["mean_logp"] for row in rows]
    assert every.summary["mean_logp"] == pytest.approx(sum(logp) / len(logp))
    assert every.summary["kept_tokens"] == sum(row["written"]["tokens"] for row in rows)


def test_the_best_is_the_likeliest(sampled: dict[str, Artifact]) -> None:
    by_question: dict[str, list[dict[str, Any]]] = {}
    for row in lines(sampled["written"]):
        by_question.setdefault(row["instruction"], []).append(row)
    rows, filtered = lines(sampled["best"]), sampled["best"].summary["filtered"]
    assert len(rows) == 25
    for row in rows:
        scores = [one["written"]["mean_logp"] for one in by_question[row["instruction"]]]
        assert row["written"]["score"] == max(scores)
    assert filtered["not the best"] == 50 - filtered.get("said before", 0)


def test_other_filters_and_budgets_ask_for_nothing_again(
    root: Path, made: dict[str, Artifact], out: Path, journal: Path
) -> None:
    before = journal.read_bytes()
    second = run(root, out, generate(root, filters={**OPEN, "max_characters": 7}, budget=160))["written"]
    assert journal.read_bytes() == before
    assert second.summary["asked"] == 20
    assert [row for row in lines(made["written"])[:20] if len(row["response"]) <= 7] == lines(second)


BUDGETS = {8: 1, 15: 1, 16: 2, 81: 10, 200: 25, 10_000: 25}  # every answer here has 8 tokens -> rows that are asked


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_a_budget_is_never_exceeded(root: Path, tmp_path: Path, batch: int) -> None:
    stages = [
        generate(root, name=f"of_{budget}", budget=budget, batch_rows=batch, seed=n)  # a seed each, so that each asks anew
        for n, budget in enumerate(BUDGETS)
    ]
    found = run(root, tmp_path, *stages)
    assert len([*(tmp_path / "written").iterdir()]) == len(BUDGETS)
    for budget, asked in BUDGETS.items():
        summary = found[f"of_{budget}"].summary
        assert summary["response_tokens"] <= budget
        assert (summary["asked"], summary["not_asked"]) == (asked, 25 - asked)


KILLED = """
import json, os, signal, sys
from potstill.recipe.parse import parse_recipe
from potstill.rollouts.journal import Journal
from potstill.run.runner import run_recipe
add, left = Journal.add, [int(sys.argv[3])]
def dying(self, written):
    if left[0] == 0:
        os.write(self._fd, b"1234abcd [3, [[")  # the kill comes in the middle of a line
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    add(self, written)
Journal.add = dying
run_recipe(parse_recipe(json.loads(sys.argv[1])), sys.argv[2])
"""


def test_a_killed_run_ends_as_one_that_was_not(root: Path, tmp_path: Path) -> None:
    hot = generate(root, samples=2, sampling={"temperature": 1.0, "max_new_tokens": 6}, batch_rows=4)
    argv = [sys.executable, "-c", KILLED, json.dumps(table(root, hot)), str(tmp_path / "killed"), "3"]
    assert subprocess.run(argv, capture_output=True).returncode == -signal.SIGKILL
    (journal,) = (tmp_path / "killed" / "written").iterdir()
    assert journal.read_bytes().count(b"\n") == 12
    before = journal.read_bytes().rpartition(b"\n")[0]
    killed = run(root, tmp_path / "killed", hot)["written"]
    assert journal.read_bytes().startswith(before)  # what was written stays as it was
    whole = run(root, tmp_path / "whole", hot)["written"]
    for name in ("rows.jsonl", "left_out.jsonl", "held_out.jsonl"):
        assert (killed.folder / name).read_bytes() == (whole.folder / name).read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_error_and_counts_nothing(root: Path, tmp_path: Path, journal: Path) -> None:
    full = tmp_path / "full" / "written" / journal.name
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"written: no space left on the disk of .*written/\w+\.jsonl; free some"):
        run(root, tmp_path / "full", generate(root))
    full.unlink()
    again = run(root, tmp_path / "full", generate(root))["written"]
    assert again.summary["answers"] == 25


def test_damaged_lines_are_written_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Journal(path) as journal:
        journal.add({0: [Answer("a\nü", True, 2, 3, -0.5)], 1: None})
        journal.add({2: [Answer("c", False)]})
    whole = path.read_bytes()
    for data, lost, rows in [
        (whole, 0, {0, 1, 2}),
        (whole[:-1], 0, {0, 1}),
        (whole[: whole.rindex(b"\n", 0, -1) + 4], 0, {0, 1}),
        (whole.replace(b"0, [[", b"9, [["), 1, {1, 2}),
        (b"\x00\xff\n" + whole, 1, {0, 1, 2}),
    ]:
        path.write_bytes(data)
        with Journal(path) as journal:
            assert (journal.lost, set(journal.rows)) == (lost, rows)
            journal.add({7: [Answer("z", True)]})
        with Journal(path) as journal:
            assert (journal.lost, set(journal.rows)) == (0, rows | {7})
            assert 0 not in rows or journal.rows[0] == [Answer("a\nü", True, 2, 3, -0.5)]


def test_before_it_runs_everything_is_known_but_the_answers(
    root: Path, made: dict[str, Artifact], out: Path, tmp_path: Path
) -> None:
    recipe = parse_recipe(table(root, generate(root, samples=2, sampling={"max_new_tokens": 8}), sft(root)))
    found = estimate(recipe, tmp_path, measure=False)
    assert not found.problems
    written, learned = found.lines
    assert written.cost.response_tokens is not None
    assert 0 < written.cost.response_tokens <= 25 * 2 * 8
    (rows,) = learned.cost.rows
    assert (rows.kept, rows.counted) == (50, False)
    after = estimate(parse_recipe(table(root, generate(root), sft(root))), out, measure=False)
    assert [line.state for line in after.lines] == ["done", "done"]
    assert after.lines[0].cost.response_tokens == made["written"].summary["response_tokens"]


def test_a_study_sees_who_taught_and_that_no_test_row_was_asked(root: Path, made: dict[str, Artifact], out: Path) -> None:
    study = [
        {"name": "SFT", "role": "sft", "model": "stage:control"},
        {"name": "Written", "role": "kd", "model": "stage:sft"},
        {"name": "Teacher", "role": "teacher", "model": f"path:{root}/teacher"},
    ]
    measured = {"name": "study", "kind": "evaluate", "study": study, "metrics": ["nll"], "primary": "nll"}
    report = {"name": "report", "kind": "report", "study": "stage:study"}
    stages = (generate(root), sft(root), sft(root, name="control", data=data(root)), measured, report)
    run(root, out, *stages)
    found = json.loads((out / "report.json").read_text())
    words = " ".join([found["headline"]["sentence"], *found["caveats"]])
    assert "NOT distilled" not in words
    assert "differ in training data" not in words
    (written,) = found["written"]
    assert (written["stage"], written["teacher"]) == ("written", f"path:{root}/teacher")
    assert written["shown"][0]["answer"] in (out / "report.html").read_text(encoding="utf-8")


def test_a_study_of_rows_that_were_asked_is_refused(root: Path, tmp_path: Path) -> None:
    study = [{"name": "Written", "role": "kd", "model": "stage:sft"}]
    own = {**data(root), "splits": {"validation": 0, "test": 1}}
    measured = {"name": "study", "kind": "evaluate", "study": study, "metrics": ["nll"], "primary": "nll", "data": own}
    with pytest.raises(RecipeError, match="sft was trained on 25 of the 60 test rows"):
        run(root, tmp_path, generate(root), sft(root), measured)
    assert not [*(tmp_path / "artifacts").iterdir()]  # before anything was written


WRONG = {
    "neither": ({"model": None}, "needs one of model and api"),
    "both": ({"api": {"url": "http://x/v1", "model": "m"}}, "needs one of model and api"),
    "greedy twice": ({"samples": 2}, "at temperature 0 would all be the same"),
    "best of one": ({"filters": {"best": "likelihood"}}, "chooses among several answers"),
    "metric of tokens": ({"filters": {"metric": "nll", "best": "metric"}}, "does not compare texts"),
    "idle metric": ({"filters": {"metric": "exact_match"}}, 'metric is for least, or for best = "metric"'),
    "least of programs without tests": ({"filters": {"metric": "pass_at_1", "least": 100}}, "no train row of jsonl has tests"),
    "no room in the budget": ({"budget": 7}, "budget = 7 is less than one row may take"),
    "language": ({"filters": {"language": "English"}}, "filters.language"),
    "no room in the model": ({"sampling": {"temperature": 0, "max_new_tokens": 250}}, "has 256 positions; set it to at most"),
    "model of rows": ({"model": "stage:nothing"}, "no earlier stage"),
}


@pytest.mark.parametrize("what", WRONG)
def test_mistakes_are_told_before_anything_runs(root: Path, tmp_path: Path, what: str) -> None:
    more, words = WRONG[what]
    stage = {name: value for name, value in generate(root, **more).items() if value is not None}
    with pytest.raises(RecipeError, match=words):
        run(root, tmp_path, stage)
    assert not [*tmp_path.glob("written/*")]


@pytest.mark.parametrize(
    "named, words",
    [
        ("stage:wirtten", "did you mean 'written'"),
        ("stage:teacher", "'teacher' makes a model, and this needs rows"),
        ("path:/nowhere", "no such folder"),
        ("stage:sft", "refers to its own stage"),
        ({"kind": "stage", "stage": "written", "splits": {"test": 0.5}}, "splits"),
        ({"kind": "stage"}, "stage"),
    ],
)
def test_references_to_rows_are_checked(root: Path, named: Any, words: str) -> None:
    teacher = sft(root, name="teacher", data=data(root))
    with pytest.raises(RecipeError, match=words):
        parse_recipe(table(root, teacher, generate(root), sft(root, data=named)))


def test_a_stage_alone_may_name_rows(root: Path) -> None:
    named = {"kind": "stage", "stage": "written"}
    (_, one), (_, two) = (parse_recipe(table(root, generate(root), sft(root, data=d))).stages for d in (named, "stage:written"))
    assert one == two


def test_rows_are_no_model(root: Path) -> None:
    with pytest.raises(RecipeError, match="'written' makes rows, and this needs a model"):
        parse_recipe(table(root, generate(root), sft(root, model="stage:written", data=data(root))))


def test_prompts_alone_are_enough(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"Say {n}."}) + "\n" for n in range(40)))
    alone = {"kind": "jsonl", "path": str(path), "response": "", "language": "en", "splits": {"validation": 0, "test": 0}}
    (made,) = run(root, tmp_path / "run", generate(root, data=alone)).values()
    rows = lines(made)
    assert sorted(questions(rows)) == sorted(f"Say {n}." for n in range(40))
    assert all(row["response"] for row in rows)
    with pytest.raises(RecipeError, match="empty"):
        run(root, tmp_path / "sft", sft(root, data=alone))


def test_all_answers_filtered_is_one_error(root: Path, made: dict[str, Artifact], out: Path) -> None:
    with pytest.raises(UserError, match=r"of 25 answers none is left \(25 cut at max_new_tokens\)"):
        run(root, out, generate(root, filters={}))


def test_precision_decides_what_is_written_and_is_known_by_it(root: Path, tmp_path: Path) -> None:
    """In bf16 the model's own log-probabilities are rounded otherwise; each precision has a journal of its own."""
    logp = {}
    for precision in ("auto", "fp32", "bf16"):
        made = run(root, tmp_path / "out", generate(root, precision=precision))["written"]
        logp[precision] = made.summary["mean_logp"]
    assert logp["auto"] == logp["fp32"] != logp["bf16"]
    assert logp["bf16"] == pytest.approx(logp["fp32"], abs=0.05)
    assert len([*(tmp_path / "out" / "written").iterdir()]) == 2
    api = {"url": "http://127.0.0.1:9/v1", "model": "m"}
    with pytest.raises(RecipeError, match="precision is of a model that is loaded here"):
        parse_recipe(table(root, {"name": "w", "kind": "generate", "api": api, "precision": "bf16"}))
