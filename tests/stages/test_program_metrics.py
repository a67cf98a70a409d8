"""Evaluations whose answers are programs: what is set aside, what is drawn, what is refused before it costs."""

import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from judged import judging

import potstill as ps
from potstill.core.artifact import read_json
from potstill.core.errors import UserError
from potstill.core.types import Abstain, Example
from potstill.metrics import Judged
from potstill.metrics.pass_at_1 import PassAt1
from potstill.metrics.pass_at_k import PassAtK
from potstill.sandbox.backend import Ended, Job
from potstill.sandbox.grader import Grader
from potstill.sandbox.verdict import Limits
from potstill.scorers import programs
from potstill.scorers.code import program_of, statements
from potstill.sources import Source
from potstill.stages.outlook import Outlook


@pytest.fixture(autouse=True)
def judge() -> Iterator[None]:
    with judging():
        yield


def problems(path: Path, wrong: int = 0, count: int = 8) -> str:
    """Rows of mbpp's shape, all for the test; the references of the first few do not pass."""
    rows = [
        {
            "text": f"Add {n}.",
            "code": f"def f(x):\n    return x + {n + (n < wrong)}",
            "test_list": [f"assert f(1) == {n + 1}"],
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def evaluation(model: Path, path: str, **more: Any) -> ps.Evaluate:
    fields: dict[str, Any] = {
        "study": [{"name": "one", "model": f"path:{model}"}],
        "data": {"kind": "mbpp", "path": path, "splits": {"validation": 0, "test": 1}},
        "prompts": {"max_tokens": 250, "max_prompt_tokens": 150},
        "metrics": ["pass_at_1"],
        "primary": "pass_at_1",
        "decoding": {"max_new_tokens": 4},
    }
    return ps.Evaluate(**(fields | more))


def test_rows_whose_reference_fails_are_set_aside_by_name(family: dict[str, Path], tmp_path: Path) -> None:
    stage = evaluation(family["student"], problems(tmp_path / "rows.jsonl", wrong=2))
    made = ps.run_stage(stage, tmp_path / "study")
    assert made.summary["test_rows"] == 6
    assert made.summary["sandbox"] == "bare"
    assert made.summary["dropped"] == {"its own reference fails its tests": 2}
    aside = read_json(made.folder / "set_aside.json")
    assert len(aside) == 2
    assert all(entry["why"].startswith("fail: ") and entry["key"] for entry in aside)
    study = read_json(made.folder / "study.json")
    assert study["rows"][0]["scores"]["pass_at_1"] == [[0.0] * 6]  # an untrained model writes no program


def test_without_a_metric_that_runs_programs_nothing_is_judged(family: dict[str, Path], tmp_path: Path) -> None:
    path = problems(tmp_path / "rows.jsonl", wrong=2)
    made = ps.run_stage(evaluation(family["student"], path, metrics=["exact_match"], primary="exact_match"), tmp_path / "study")
    assert made.summary["test_rows"] == 8
    assert not (made.folder / "set_aside.json").exists()


def test_where_every_reference_fails_nothing_can_be_measured(family: dict[str, Path], tmp_path: Path) -> None:
    stage = evaluation(family["student"], problems(tmp_path / "rows.jsonl", wrong=8))
    with pytest.raises(UserError, match="every row's own reference fails its tests; the first: fail: "):
        ps.run_stage(stage, tmp_path / "study")


def test_samples_are_drawn_for_pass_at_k_alone_and_kept(family: dict[str, Path], tmp_path: Path) -> None:
    stage = evaluation(
        family["student"],
        problems(tmp_path / "rows.jsonl", count=6),
        metrics=[PassAtK(k=2, samples=3), ps.Metric.parse("pass_at_1")],
    )
    folder = ps.run_stage(stage, tmp_path / "study").folder
    study = read_json(folder / "study.json")
    (row,) = study["rows"]
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    drawn = [line["samples"][row["name"]]["pass_at_k"][0] for line in lines]
    assert [len(each) for each in drawn] == [3] * 6
    assert len({text for each in drawn for text in each}) > 6  # sampled, not greedy
    assert row["scores"]["pass_at_k"] == [[0.0] * 6]
    assert [line["outcomes"][row["name"]] for line in lines] == [
        {metric: [row["outcomes"][metric][0][n]] for metric in ("pass_at_1", "pass_at_k")} for n in range(6)
    ]
    assert [len(each) for each in row["outcomes"]["pass_at_k"][0]] == [3] * 6
    # an untrained model writes no Python: what its programs are called must follow from the kept text alone
    for line, greedy in zip(lines, row["outcomes"]["pass_at_1"][0], strict=True):
        code = program_of(line["answers"][row["name"]][0])
        parsed = statements(code)
        assert greedy == (["no_parse"] if parsed is None else ["no_program"] if parsed == 0 else greedy)
    assert study["judged_by"][0]["python"] == platform.python_version()


def test_how_programs_end() -> None:
    """One answer of each kind, by the real grader; the names are those of the sandbox where the program began."""
    row = ps.Example("k", "q", "r", tests=programs.Tests(asserts="assert f() == 1", before="import math"))
    answers = {
        "pass": "def f():\n    return 1",
        "fail": "```python\ndef f():\n    return 2\n```",
        "crash": "raise SystemError",
        "timeout": "while True: pass",
        "no_parse": "I do not know, sorry.",
        "no_program": "```sh\nls\n```",
        "abstain": "def f():\n    return 1",
    }
    bare = ps.Example("k", "q", "r")
    rows = [bare if how == "abstain" else row for how in answers]
    found = PassAt1(judging=programs.Judging(time_s=0.5)).judged(list(answers.values()), rows)
    assert [one.outcomes for one in found] == [(how,) for how in answers]
    scores = [one.score for one in found]
    assert scores[:6] == [100.0, 0, 0, 0, 0, 0]
    assert isinstance(scores[6], Abstain)


def test_pass_at_k_of_known_answers() -> None:
    row = ps.Example("k", "q", "r", tests=programs.Tests(asserts="assert f() == 1"))
    right, wrong = "def f():\n    return 1", "def f():\n    return 2"
    metric = PassAtK(k=2, samples=4)
    answers = [[right] * 4, [right, wrong, wrong, wrong], [wrong] * 4]
    assert metric(answers, [row] * 3) == pytest.approx([100, 50, 0])  # 1 - C(3,2)/C(4,2) = 1/2


def test_rows_without_tests_are_a_problem_before_the_run(family: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"#### {n}"}) + "\n" for n in range(9)))
    data = {"kind": "gsm8k", "path": str(path), "splits": {"validation": 0, "test": 1}}
    stage = evaluation(family["student"], "", data=data)
    (problem,) = [found for found in stage.problems(Outlook()) if found.place == "metrics"]
    assert problem.rule == "pass_at_1: no test row of gsm8k has tests; leave it out, or name rows with tests"


def test_tests_that_cannot_be_run_are_a_problem_before_the_run(family: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"text": "Add.", "code": "def f(x):\n    return x", "test_list": ["assert f(1) == (2"]}
    path.write_text(json.dumps(row) + "\n")
    found = [problem for problem in evaluation(family["student"], str(path)).problems(Outlook()) if problem.place == "data"]
    assert len(found) == 1
    assert found[0].rule.startswith("test row '")
    assert "never closed" in found[0].rule


def test_a_machine_without_a_sandbox_is_a_problem_before_the_run(family: dict[str, Path], tmp_path: Path) -> None:
    def none() -> Grader:
        raise UserError("no sandbox is safe here")

    programs.use(none)
    stage = evaluation(family["student"], problems(tmp_path / "rows.jsonl"))
    (problem,) = [found for found in stage.problems(Outlook()) if found.place == "metrics"]
    assert problem.rule == "pass_at_1: no sandbox is safe here"


def test_a_sandbox_that_fails_gives_no_score_and_no_study(family: dict[str, Path], tmp_path: Path) -> None:
    class Broken:
        name = "broken"

        def run(self, job: Job, limits: Limits) -> Ended:
            return Ended(False, None, None, None, b"", b"", 0.0, trouble="no room")

        def close(self) -> None:
            pass

    programs.use(lambda: Grader(Broken(), workers=1))
    stage = evaluation(family["student"], problems(tmp_path / "rows.jsonl"))
    with pytest.raises(UserError, match=r"could not be judged: .*no room"):
        ps.run_stage(stage, tmp_path / "study")


def test_programs_are_rows_like_others() -> None:
    source = Source.parse({"kind": "programs", "families": 4, "new_families": 1, "instances": 5})
    assert isinstance(source, Source)
    assert next(source.examples("test")).tests is not None


def test_validation_draws_samples_as_the_evaluation_does(family: dict[str, Path], tmp_path: Path) -> None:
    """Before the first step, pass@k on validation rows is that of an evaluation of the same model and rows."""
    metrics = ({"kind": "pass_at_k", "k": 1, "samples": 3}, "pass_at_1")
    data = {"kind": "mbpp", "path": problems(tmp_path / "rows.jsonl"), "splits": {"validation": 0.5, "test": 0}}
    common: dict[str, Any] = {"data": data, "prompts": {"max_tokens": 250, "max_prompt_tokens": 150}}
    seen: list[list[str]] = []

    def passes(self: PassAtK, answers: Sequence[Sequence[str]], examples: Sequence[Example]) -> list[Judged]:
        seen.append([text for drawn in answers for text in drawn])
        return [Judged(float(len(drawn[0]) % 7)) for drawn in answers]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PassAtK, "judged", passes)
        validation = {"times": 1, "max_new_tokens": 4, "metrics": metrics}
        optim = {"steps": 1, "batch_size": 2, "lr": 1e-12}
        trained = ps.run_stage(
            ps.SFT(model=f"path:{family['student']}", optim=optim, validation=validation, **common), tmp_path / "sft"
        )
        stage = evaluation(
            family["student"],
            data["path"],
            data=data,
            metrics=list(metrics),
            split="validation",
            decoding={"max_new_tokens": 4},
        )
        ps.run_stage(stage, tmp_path / "study")
    first, last, evaluated = seen
    assert first == last == evaluated  # the learning rate moves nothing
    assert len(first) % 3 == 0
    lines = [json.loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    means = [float(len(text) % 7) for text in first[::3]]
    assert lines[0]["validation_pass_at_k"] == pytest.approx(sum(means) / len(means))
