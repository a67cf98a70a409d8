"""The stage `grpo`: it runs from a recipe, refuses before the cost, and is planned with its answers, reference and teacher."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from judged import judging
from tiny_parts import save_pair, write_rows
from tiny_rewards import tiny_rewards

from potstill.core.artifact import Artifact, file_hash
from potstill.core.errors import UserError
from potstill.recipe.parse import parse_recipe
from potstill.rewards import Answered, Reward
from potstill.rollouts.local import Local
from potstill.run.preflight import stage_notes
from potstill.run.runner import run_recipe
from potstill.scorers import programs
from potstill.stages import probed
from potstill.stages.cost import reading_flops
from potstill.stages.grpo import GRPO
from potstill.stages.outlook import Outlook
from potstill.stages.rewarded import Course, courses, format_only, in_words, rose, summary_of
from potstill.stages.set_aside import failing_rows

OPTIM = {"steps": 3, "batch_size": 8, "lr": 1e-3}


@pytest.fixture(scope="module", autouse=True)
def kinds() -> Iterator[None]:
    with tiny_rewards():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    save_pair(folder)
    write_rows(folder / "rows.jsonl")
    return folder


def table(root: Path, **fields: Any) -> dict[str, Any]:
    stage = {"name": "it", "kind": "grpo", "model": f"path:{root}/student", "rewards": ["vowels", "overlap"], "probe_rows": 0}
    more = {"optim": OPTIM, "samples": {"per_prompt": 4, "max_new_tokens": 8, "updates": 2}, "validation": {"times": 0}}
    return {
        "name": "one",
        "data": {"kind": "jsonl", "path": str(root / "rows.jsonl"), "splits": {"validation": 0.2, "test": 0.3}},
        "prompts": {"max_tokens": 128, "max_prompt_tokens": 96},
        "checkpoint": {"every_steps": 2},
        "stage": [stage | more | fields],
    }


def recipe(root: Path, **fields: Any) -> Any:
    return parse_recipe(table(root, **fields))


def run(root: Path, folder: Path, **fields: Any) -> Artifact:
    (made,) = run_recipe(recipe(root, **fields), folder).values()
    return made


def figures(made: Artifact) -> list[dict[str, float]]:
    return [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]


WAYS: dict[str, dict[str, Any]] = {
    "recommended": {"policy": {"cut": "counted"}},
    "paper": {"policy": "paper"},
    "deepseek, an adapter": {"policy": "deepseek", "adapter": {"r": 2}},
    "dr_grpo": {"policy": "dr_grpo"},
    "dapo": {"policy": {"preset": "dapo", "cut": "counted"}},
    "gspo": {"policy": {"ratio": "sequence_mean", "eps_low": 3e-4, "eps_high": 4e-4, "cut": "counted"}},
}
ALWAYS = (
    *("policy", "clipped", "nll", "entropy", "length", "cut", "reward_total", "reward_vowels", "reward_overlap"),
    *("spread", "attribution_vowels", "attribution_overlap", "silent", "abstained", "redrawn", "gap", "importance"),
    *("ratio_min", "ratio_max"),
)


@pytest.mark.parametrize("name", WAYS)
def test_every_preset_trains_and_shows_its_figures(name: str, root: Path, tmp_path: Path) -> None:
    made = run(root, tmp_path, **WAYS[name])
    steps = figures(made)
    assert [line["samples_age"] for line in steps] == [0, 1, 0]
    assert all(math.isfinite(line[f"samples_{figure}"]) for line in steps for figure in ALWAYS)
    assert all(line["samples_gap"] < 1e-4 for line in steps)
    assert all(line["samples_attribution_vowels"] + line["samples_attribution_overlap"] == pytest.approx(1) for line in steps)
    assert [line["samples_ratio_min"] == line["samples_ratio_max"] == 1 for line in steps] == [True, False, True]
    beta = recipe(root, **WAYS[name]).stages[0].policy.beta
    assert [("samples_kl" in line, "samples_kl_exact" in line) for line in steps] == [(bool(beta), bool(beta))] * 3
    if beta:  # it begins where its reference is
        assert abs(steps[0]["samples_kl"]) < 1e-7 < steps[2]["samples_kl"]
        assert abs(steps[0]["samples_kl_exact"]) < 1e-6 < steps[2]["samples_kl_exact"]
    drawn = round(sum(line["samples_length"] * 8 for line in (steps[0], steps[2])))
    if not recipe(root, **WAYS[name]).stages[0].policy.redraws:
        assert made.summary["generated_tokens"] == made.summary["trained"]["generated_tokens"] == drawn > 0
        assert made.summary["rollouts"] == 2 * OPTIM["batch_size"]  # two rounds
    assert (made.summary["trained"]["by"], made.summary["trained"]["teacher"]) == ("grpo", None)
    assert set(made.summary["rewards"]) == {"vowels", "overlap"}
    assert made.summary["format_only"] is False  # too few rounds to tell


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("more", [{}, {"adapter": {"r": 2}}], ids=["every weight", "an adapter"])
def test_an_only_update_ends_with_the_same_bits_as_the_first_of_several(
    more: dict[str, Any], precision: str, root: Path, tmp_path: Path
) -> None:
    """With a reference, which is read in between, and layers that are computed again on the way back."""

    def after_one_step(updates: int) -> tuple[str, dict[str, float]]:
        optim = {**OPTIM, "steps": 1, "precision": precision, "activation_checkpointing": True}
        samples = {"per_prompt": 4, "max_new_tokens": 8, "updates": updates, "max_gap": 1.0}
        made = run(root, tmp_path / str(updates), policy="deepseek", samples=samples, optim=optim, **more)
        return file_hash(made.folder / "model.safetensors"), figures(made)[0]

    (one, found), (several, wanted) = after_one_step(1), after_one_step(3)
    assert one == several
    assert found["samples_ratio_min"] == found["samples_ratio_max"] == 1
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-12)


def test_switching_the_adapter_off_is_a_frozen_copy(root: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"policy": {"preset": "deepseek", "beta": 0.5}, "adapter": {"r": 2}}
    own = run(root, tmp_path / "off", **fields)
    copy = run(root, tmp_path / "copy", **fields, reference=f"path:{root}/student")
    assert figures(own)[2]["samples_kl"] > 1e-7
    for one, other in zip(figures(own), figures(copy), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-9)


def test_a_named_reference_is_measured_though_nothing_pulls_to_it(root: Path, tmp_path: Path) -> None:
    other = run(root, tmp_path / "a", policy="dr_grpo", reference=f"path:{root}/teacher")
    none = run(root, tmp_path / "b", policy="dr_grpo")
    assert all(line["samples_kl_exact"] > 1e-3 for line in figures(other))
    assert file_hash(other.folder / "model.safetensors") == file_hash(none.folder / "model.safetensors")


def test_a_teacher_stands_beside_and_pulls(root: Path, tmp_path: Path) -> None:
    """With rewards that say nothing, reverse KL to the teacher falls; validation compares with the teacher."""
    fields: dict[str, Any] = {
        "policy": {"beta_kd": 1.0, "cut": "counted"},
        "teacher": f"path:{root}/teacher",
        "rewards": ["exact"],
        "optim": {**OPTIM, "steps": 12, "lr": 1e-2},
        "validation": {"times": 1, "rows": 4, "max_new_tokens": 4, "metrics": ["nll", "kl_to_teacher"]},
    }
    made = run(root, tmp_path, **fields)
    lines = [line for line in figures(made) if "loss" in line]
    assert lines[-1]["samples_reverse_kl"] < 0.9 * lines[0]["samples_reverse_kl"]
    validated = [line["validation_kl_to_teacher"] for line in figures(made) if "validation_kl_to_teacher" in line]
    assert validated[1] < validated[0]
    assert made.summary["trained"]["teacher"] == f"path:{root}/teacher"
    assert made.summary["signal"] == {"kept": "live"}


def test_rewards_rise_and_a_rise_of_the_form_alone_is_called_so(root: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "policy": {"cut": "counted"},
        "optim": {"steps": 30, "batch_size": 16, "lr": 1e-2, "schedule": "constant"},
        "samples": {"per_prompt": 8, "max_new_tokens": 6},
    }
    made = run(root, tmp_path / "form", **fields, rewards=["vowels", "exact"])
    said = made.summary["rewards"]
    assert (said["vowels"]["rose"], said["exact"]["rose"], said["exact"]["last"]) == (True, False, 0.0)
    assert made.summary["format_only"] is True
    (stage,) = recipe(root, **fields, rewards=["vowels", "exact"]).stages
    assert "format only: rewards of the form rose, correctness did not (vowels 0." in stage.closing(made.summary)
    assert "exact 0 → 0" in stage.closing(made.summary)


# --- what rewards are given ---

SINGLE = {"per_prompt": 2, "max_new_tokens": 8, "updates": 1}


def test_each_answer_is_graded_beside_its_own_row(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that do not fit are left out of the store: numbers, not places, lead back to the rows."""
    long = {"instruction": "too " * 200, "response": "long"}
    lines = (root / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(long), *lines[:5], json.dumps(long), *lines[5:]]) + "\n")
    seen: list[Answered] = []
    monkeypatch.setattr(
        Reward.kinds["vowels"], "__call__", lambda self, answers: seen.extend(answers) or [float(len(a.text)) for a in answers]
    )
    data = {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl"), "splits": {"validation": 0.0, "test": 0.0}}
    asked: list[str] = []
    engine = Local.__call__

    def noted(self: Local, prompts: Any, *more: Any) -> Any:
        asked.extend(self.tokenizer.decode(list(prompt.ids)) for prompt in prompts for _ in range(more[0]))
        return engine(self, prompts, *more)

    monkeypatch.setattr(Local, "__call__", noted)
    run(root, tmp_path / "run", data=data, rewards=["vowels"], policy="paper", samples=SINGLE)
    assert len(seen) == len(asked) == 24
    assert all(answer.example.instruction in prompt for answer, prompt in zip(seen, asked, strict=True))
    assert all(answer.tokens <= 8 and answer.finished is (answer.tokens < 8 or answer.finished) for answer in seen)


# --- rows whose own reference fails ---


def programs_of(folder: Path, wrong: tuple[int, ...], count: int = 12) -> dict[str, Any]:
    """Rows of mbpp's shape, all for training; of some the reference does not pass."""
    rows = [
        {"text": f"Add {n}.", "code": f"def f(x):\n    return x + {n + (n in wrong)}", "test_list": [f"assert f(1) == {n + 1}"]}
        for n in range(count)
    ]
    (folder / "programs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "mbpp", "path": str(folder / "programs.jsonl"), "splits": {"validation": 0, "test": 0}}


PAID = {"rewards": [{"kind": "tests", "weight": 9.0}, "vowels"], "samples": SINGLE, "policy": "dr_grpo"}


@pytest.mark.parametrize("wrong", [(), (3, 7)])
def test_rows_whose_reference_fails_are_not_learned_from(
    wrong: tuple[int, ...], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are named; answers to the others are still graded beside their own row; an interrupted stage judges none again."""
    data, asked = programs_of(tmp_path, wrong), list[str]()
    monkeypatch.setattr(
        Reward.kinds["vowels"],
        "__call__",
        lambda self, answers: asked.extend(a.example.instruction for a in answers) or [float(len(a.text)) for a in answers],
    )
    fields: dict[str, Any] = {**PAID, "data": data, "optim": {**OPTIM, "steps": 3}}
    with judging():
        made = run(root, tmp_path / "run", **fields)
    lines = [json.loads(line)["text"] for line in (tmp_path / "programs.jsonl").read_text().splitlines()]
    right = [line for n, line in enumerate(lines) if n not in wrong]
    told = {instruction.partition("\n")[0] for instruction in asked}
    assert told == set(right)  # 12 prompts of three rounds of four
    aside = json.loads((made.folder / "set_aside.json").read_text())
    assert [(entry["row"], entry["why"][:6]) for entry in aside] == [(n, "fail: ") for n in wrong]
    left = {"its own reference fails its tests": len(wrong)} if wrong else {}
    assert made.summary["data"]["dropped"] == made.summary["trained"]["left_out"] == left
    assert made.summary["data"]["rows"] == 12 - len(wrong)
    (stage,) = recipe(root, **fields).stages
    assert ("2 left out: its own reference fails its tests" in stage.closing(made.summary)) is bool(wrong)


def test_references_are_judged_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = list(recipe(root, **PAID, data=programs_of(tmp_path, (0,))).stages[0].data.examples("train"))
    judge = Reward.kinds["tests"]()
    with judging():
        assert failing_rows(examples, judge, tmp_path, "it") == {0}
    monkeypatch.setattr(programs, "failing_references", None)
    assert failing_rows(examples, judge, tmp_path, "it") == {0}


def test_where_every_reference_fails_nothing_is_learned(root: Path, tmp_path: Path) -> None:
    data = programs_of(tmp_path, tuple(range(12)))
    with judging(), pytest.raises(UserError, match="it: every row's own reference fails its tests; the first: fail: "):
        run(root, tmp_path / "run", **PAID, data=data)


# --- killed ---

KILLED = """
import json, os, signal, sys, torch
sys.path.insert(0, sys.argv[3])
torch.set_num_threads(1)
from potstill.losses.policy import PolicyGradient
from potstill.recipe.parse import parse_recipe
from potstill.rollouts.local import Local
from potstill.run.runner import run_recipe
from potstill.train.groups import Groups
from tiny_rewards import tiny_rewards

def run_until(step, dying, name):
    step_of, work, at, calls = Groups.__call__, getattr(dying, name), [-1], [0]
    def began(self, step):
        at[0], calls[0] = step, 0
        return step_of(self, step)
    def killed(self, *args):
        calls[0] += at[0] == step
        if calls[0] == 2:  # in the middle: one micro-batch has its gradient, or groups are being drawn again
            os.kill(os.getpid(), signal.SIGKILL)
        return work(self, *args)
    Groups.__call__ = began
    setattr(dying, name, killed)
    with tiny_rewards():
        run_recipe(parse_recipe(json.loads(sys.argv[1])), sys.argv[2])

DRAWING, LEARNING = (Groups, "_groups"), (PolicyGradient, "__call__")
for step, what in (3, DRAWING), (5, LEARNING):
    child = os.fork()
    if child == 0:
        run_until(step, *what)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, (step, what)
"""


def test_killed_in_drawing_and_in_updates_it_ends_the_same(root: Path, tmp_path: Path) -> None:
    """Rounds of 3 updates, a checkpoint after every second one: the first kill loses the round, the second finds it there."""
    fields: dict[str, Any] = {
        "optim": {**OPTIM, "steps": 6, "batch_size": 16, "micro_batch_tokens": 60},
        "samples": {"per_prompt": 2, "max_new_tokens": 8, "updates": 3},
        "policy": {"preset": "paper", "redraws": 2},
        "rewards": ["odd", "exact"],
        "validation": {"times": 2, "rows": 4, "max_new_tokens": 4},
    }
    tests = str(Path(__file__).parents[1])
    argv = [sys.executable, "-c", KILLED, json.dumps(table(root, **fields)), str(tmp_path / "killed"), tests]
    subprocess.run(argv, check=True, capture_output=True)
    (work,) = (tmp_path / "killed" / "artifacts").glob(".work-it-*")
    assert sorted(path.name for path in (work / "checkpoints").iterdir())[-1].endswith("4")
    killed, whole = (run(root, tmp_path / name, **fields) for name in ("killed", "whole"))
    assert [line["step"] for line in figures(whole) if "lr" in line] == [*range(1, 7)]
    assert any(line["samples_redrawn"] > 0 for line in figures(whole) if "samples_redrawn" in line)
    assert whole.summary["rollouts"] > 2 * 16  # groups drawn again are counted
    for name in ("model.safetensors", "metrics.jsonl"):
        assert file_hash(killed.folder / name) == file_hash(whole.folder / name), name
    counted = ("generated_tokens", "sampled_tokens", "response_tokens", "tokens", "rewards", "rollouts")
    assert {name: killed.summary[name] for name in counted} == {name: whole.summary[name] for name in counted}


# --- refusals ---

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "groups": (
        {"samples": {"per_prompt": 3}},
        "optim.batch_size = 8 answers, which per_prompt = 3 does not divide",
    ),
    "a group of one": ({"samples": {"per_prompt": 1}}, "it.samples.per_prompt"),
    "positions": ({"samples": {"per_prompt": 4, "max_new_tokens": 250}}, "it.samples.max_new_tokens"),
    "no rewards": ({"rewards": []}, "it.rewards"),
    "no such reward": ({"rewards": ["vowel"]}, "no reward of kind 'vowel'; did you mean 'vowels'?"),
    "no such reward at all": (
        {"rewards": ["beauty"]},
        "'beauty'; one of your own is given with --plugin FILE",
    ),
    "no such preset": ({"policy": "papper"}, "it.policy"),
    "a number for a policy": (
        {"policy": 3},
        "must be a preset's name (recommended, paper, deepseek, ",
    ),
    "a field of minillm": ({"estimator": {}}, "it.estimator"),
    "a pull without a teacher": ({"policy": {"beta_kd": 0.1}}, "policy.beta_kd = 0.1 needs a teacher"),
    "a teacher without a pull": ({"teacher": "path:/nowhere"}, "teacher is for policy.beta_kd > 0"),
    "no such teacher": ({"teacher": "path:/nowhere", "policy": {"beta_kd": 0.1}}, "it.teacher"),
    "no such reference": ({"reference": "path:/nowhere"}, "it.reference"),
    "cold": ({"samples": {"temperature": 0}}, "it.samples.temperature"),
    "no tests": ({"rewards": ["vowels", "programs"]}, "programs: no train row of jsonl has tests"),
}


def test_a_ratio_of_whole_answers_over_several_updates_is_noted(root: Path) -> None:
    def notes(updates: int, policy: str) -> list[str]:
        samples = {"per_prompt": 4, "max_new_tokens": 8, "updates": updates}
        found = stage_notes(recipe(root, samples=samples, policy=policy).stages)
        return [note for note in found if note.startswith("it: policy")]

    (note,) = notes(2, "paper")
    assert note.startswith("it: policy.ratio = 'sequence' with samples.updates = 2: ")
    assert note.endswith("set samples.updates = 1, or policy.ratio = 'token'")
    assert notes(1, "paper") == notes(2, "deepseek") == []


def test_rewards_of_the_form_alone_are_noted(root: Path) -> None:
    def noted(*rewards: str) -> bool:
        return any(
            "no reward judges whether an answer is right" in note for note in stage_notes(recipe(root, rewards=rewards).stages)
        )

    assert noted("think_format", "steps")
    assert not noted("think_format", "answer")


def test_length_needs_tests_only_where_tests_say_what_is_right(root: Path) -> None:
    def told(reward: Any) -> list[str]:
        (stage,) = recipe(root, rewards=["vowels", reward]).stages
        return [problem.place for problem in stage.problems(Outlook())]

    assert told("length") == ["rewards[1]"]
    assert told({"kind": "length", "right": "answer"}) == []
    assert not Reward.kinds["length"].correctness  # or a rise of length alone would hide "format only"


@pytest.mark.parametrize("name", WRONG)
def test_refused_before_it_runs(name: str, root: Path, tmp_path: Path) -> None:
    fields, told = WRONG[name]
    with pytest.raises(UserError) as error:
        run(root, tmp_path, **fields)
    assert told in str(error.value)
    assert not list((tmp_path / "artifacts").glob("[!.]*")) if (tmp_path / "artifacts").exists() else True


def test_a_reward_that_the_reference_does_not_win_is_refused_before_anything_runs(root: Path, tmp_path: Path) -> None:
    """Length alone, which a very long answer wins; where `exact` makes up for it none does."""
    (stage,) = recipe(root, rewards=["exact", "long"], probe_rows=4).stages
    (problem,) = stage.problems(Outlook())
    assert problem.place == "rewards"
    assert problem.rule.startswith("the probe '")
    assert "more than the reference answer of row '" in problem.rule
    assert ", by long: training would climb there" in problem.rule
    with pytest.raises(UserError, match=r"it.rewards  the probe '"):
        run(root, tmp_path / "a", rewards=["exact", "long"], probe_rows=4)
    assert not list((tmp_path / "a" / "artifacts").glob(".work-it-*"))
    (unprobed,) = recipe(root, rewards=["exact", "long"], probe_rows=0).stages
    assert not list(unprobed.problems(Outlook()))
    heavy = [{"kind": "exact", "weight": 1e4}, "long"]
    run(root, tmp_path / "b", rewards=heavy, probe_rows=4, optim={**OPTIM, "steps": 1}, policy="paper")


def test_what_could_not_be_probed_before_is_before_the_first_step(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that an earlier stage writes, for one."""
    monkeypatch.setattr(GRPO, "_probe_problems", lambda self, outlook: iter(()))
    with pytest.raises(UserError, match="rewards: the probe '"):
        run(root, tmp_path / "a", rewards=["exact", "long"], probe_rows=4)
    (work,) = (tmp_path / "a" / "artifacts").glob(".work-it-*")
    assert not (work / "metrics.jsonl").exists()


def test_probes_pass_over_rows_whose_own_reference_fails(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the reference is worth nothing, and an answer in the right form wins."""
    rewards = [{"kind": "tests", "weight": 9.0}, "vowels"]
    fields: dict[str, Any] = {"rewards": rewards, "probe_rows": 12, "data": programs_of(tmp_path, (3, 7)), "samples": SINGLE}
    (stage,) = recipe(root, **fields).stages
    with judging():
        assert not list(stage.problems(Outlook()))
        monkeypatch.setattr(probed, "failing", lambda rows, judge: {})
        assert [problem.place for problem in stage.problems(Outlook())] == ["rewards"]


def test_a_reward_that_cannot_grade_any_reference_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it.rewards  'unsure' grades the reference of none of 4 rows \(nobody knows\)"):
        run(root, tmp_path, rewards=["vowels", "unsure"], probe_rows=4)


def test_the_plan_counts_answers_reference_and_teacher(root: Path) -> None:
    def cost(**fields: Any) -> Any:
        (stage,) = recipe(root, **fields).stages
        return stage.cost(Outlook())

    plain = cost()
    assert plain.steps == 3
    assert cost(policy="deepseek").flops > plain.flops
    assert cost(policy="deepseek").memory_bytes > plain.memory_bytes
    assert cost(policy="deepseek", adapter={}).memory_bytes < cost(policy="deepseek").memory_bytes
    assert cost(policy={"redraws": 2}).flops > plain.flops
    with_teacher = cost(policy={"beta_kd": 0.1}, teacher=f"path:{root}/teacher")
    assert with_teacher.flops > plain.flops
    assert with_teacher.memory_bytes > plain.memory_bytes
    assert with_teacher.step.teacher is not None
    rows = len(list(recipe(root).stages[0].data.examples("train")))
    assert cost(optim={"epochs": 2.0, "batch_size": 8}).steps == 2 * math.ceil(2 * rows / 2)


def test_the_plan_assumes_no_answer_longer_than_may_be_written(root: Path) -> None:
    (stage,) = recipe(root, samples={"per_prompt": 4, "max_new_tokens": 2}).stages
    cost = stage.cost(Outlook())
    (rows,) = cost.rows
    answers = cost.steps * stage.optim.batch_size
    assert rows.response > 2
    assert cost.response_tokens == 2 * answers
    assert cost.tokens <= round(answers * (rows.prompt + 2))


def test_the_plan_has_answers_judged_where_several_updates_learn_from_them(root: Path) -> None:
    """What a round's drawing takes is found from redraws; then what two updates add to it is one pass over the answers."""

    def cost(updates: int, **policy: Any) -> Any:
        samples = {"per_prompt": 4, "max_new_tokens": 8, "updates": updates}
        (stage,) = recipe(root, samples=samples, policy=policy, optim={**OPTIM, "steps": 2}).stages
        return stage.cost(Outlook())

    one, two = cost(1), cost(2)
    drawing = (cost(1, redraws=1).flops - one.flops) / 2
    size, tokens, responses = one.step.size, one.tokens / 2, one.response_tokens / 2
    assert two.flops - one.flops + drawing == pytest.approx(reading_flops(size, tokens, responses), rel=1e-2)
    distributions = reading_flops(size, 0, one.response_tokens)
    assert cost(1, ratio="sequence").flops - one.flops == pytest.approx(distributions, rel=1e-2)
    assert cost(2, ratio="sequence").flops - two.flops == pytest.approx(distributions, rel=1e-2)
    reference = reading_flops(size, one.tokens, one.response_tokens)
    assert cost(1, beta=0.1).flops - one.flops == pytest.approx(reference + distributions, rel=1e-2)
    assert cost(2, beta=0.1).flops - two.flops == pytest.approx(reference / 2, rel=1e-2)


# --- the course of a run ---


def curve(*values: float) -> list[dict[str, float]]:
    return [{"samples_age": 0.0, "samples_reward_it": value} for value in values]


def test_a_rise_is_more_than_noise() -> None:
    assert rose([0.0] * 4 + [1.0] * 4) == (0.0, 1.0, True)
    assert rose([0.5, 0.6, 0.4, 0.5, 0.5, 0.6, 0.55, 0.52])[2] is False
    assert rose([0.0, 1.0] * 20)[2] is False
    assert rose([1.0] * 4 + [0.0] * 4)[2] is False
    assert rose([0.0, 1.0])[2] is None
    assert rose([0.3] * 8)[2] is False


def course(rose: bool | None, correctness: bool) -> Course:
    return Course(0.0, 1.0, rose, correctness, None, 1.0)


def test_format_only_needs_both() -> None:
    form, right = course(True, False), course(True, True)
    assert format_only({"a": form, "b": course(False, True)})
    assert not format_only({"a": form, "b": right})
    assert not format_only({"a": course(False, False), "b": course(False, True)})
    assert not format_only({"a": form, "b": course(False, True), "c": right})
    assert not format_only({"a": form, "b": replace(course(False, True), first=0.97)})  # it could not rise
    assert not format_only({"a": form})
    assert not format_only({"a": course(None, False), "b": course(None, True)})


def test_no_answer_ever_earned_it_only_where_none_did() -> None:
    def said(curve: Sequence[float]) -> str:
        lines = [{"samples_age": 0, "samples_reward_tests": value} for value in curve]
        return in_words(summary_of(courses(lines, [Reward.kinds["tests"].model_validate({})])))

    zero = [0.0] * 12
    assert said(zero) == "tests 0 → 0, no answer ever earned tests"
    assert said([*zero[:5], 0.125, *zero[6:]]) == "tests 0 → 0"


def test_only_a_rounds_first_step_counts() -> None:
    lines = [*curve(*[0.0] * 4, *[1.0] * 4), {"samples_age": 1.0, "samples_reward_vowels": 9.0}]
    assert courses(lines, [Reward.kinds["vowels"]()]) == {}  # type: ignore[list-item]
    named = [{**line, "samples_reward_vowels": line["samples_reward_it"]} for line in lines if "samples_reward_it" in line]
    found = courses([*named, lines[-1]], [Reward.kinds["vowels"]()])["vowels"]  # type: ignore[list-item]
    assert (found.first, found.last, found.rose) == (0.0, 1.0, True)
