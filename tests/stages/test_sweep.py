"""A sweep from recipe to report: what is trained, what is done again, what is picked, and by what."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tiny_parts import rows

from potstill.commands.chat import pick as pick_model
from potstill.commands.plan import estimate
from potstill.core.artifact import Artifact, read_json, write_text
from potstill.core.errors import UserError
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, instruction_pairs
from potstill.edges.models import load_model, load_tokenizer
from potstill.losses.scoring import mean_nll
from potstill.recipe.parse import parse_recipe
from potstill.run.runner import execute, run_recipe
from potstill.sources.jsonl import Jsonl
from potstill.stages.base import Context
from potstill.stages.best import Best
from potstill.stages.lineage import as_chosen
from potstill.study.records import Study, Trained
from potstill.train.work import Work

SHAPE = {"hidden_size": 32, "layers": 2, "intermediate_size": 64, "positions": 256}
PROMPTS = {"max_tokens": 160, "max_prompt_tokens": 120}
LOW, HIGH = 1e-8, 1e-2  # nearly nothing is learned, and something
ONCE = {"times": 1, "rows": 6, "max_new_tokens": 2}


def source(path: Path) -> dict[str, Any]:
    return {"kind": "jsonl", "path": str(path), "context": "context", "splits": {"validation": 0.2, "test": 0.2}}


def recipe(path: Path, rates: list[float], by: str = "validation_nll", seeds: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    optim = {"steps": 5, "batch_size": 8, "lr": 3e-3}
    tuned = {"per_seed": True, "optim": optim, "validation": ONCE}
    study = [
        {"name": "SFT", "role": "sft", "model": "stage:sft"},
        {"name": "KD", "role": "kd", "model": "stage:kd"},
    ]
    return {
        "name": "swept",
        "seeds": list(seeds),
        "data": source(path),
        "prompts": PROMPTS,
        "sweep": {"kd.optim.lr": rates, "by": by},
        "stage": [
            {"name": "base", "kind": "pretrain", "shape": SHAPE, "vocab_size": 320, "optim": optim},
            {"name": "sft", "kind": "sft", "model": "stage:base", **tuned},
            {"name": "kd", "kind": "distill", "student": "stage:base", "teacher": "stage:base", "ratio": 0.1, **tuned},
            {"name": "kd4", "kind": "quantize", "model": "stage:kd", "method": "rtn", "rows": 2},
            {
                "name": "study",
                "kind": "evaluate",
                "study": study,
                "metrics": ["rouge_l", "nll"],
                "decoding": {"max_new_tokens": 2},
            },
            {"name": "report", "kind": "report", "study": "stage:study"},
        ],
    }


def write_rows(path: Path, test_response: str | None = None) -> Path:
    """Sixty rows; those of the test split may be answered otherwise, which leaves every row in its split."""
    made = rows(60)
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    if test_response is not None:
        asked = {example.instruction for example in Jsonl.parse(source(path)).examples("test")}
        changed = [row | {"response": test_response} if row["instruction"] in asked else row for row in made]
        path.write_text("".join(json.dumps(row) + "\n" for row in changed), encoding="utf-8")
    return path


def run(table: dict[str, Any], out: Path) -> dict[str, Artifact]:
    return run_recipe(parse_recipe(table), out)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Artifact]]:
    folder = tmp_path_factory.mktemp("sweep")
    path = write_rows(folder / "rows.jsonl")
    return path, folder / "run", run(recipe(path, [LOW, HIGH]), folder / "run")


def ages(done: dict[str, Artifact]) -> dict[str, tuple[str, int]]:
    return {ident: (a.folder.name, os.stat(a.folder / "artifact.json").st_mtime_ns) for ident, a in done.items()}


def test_shared_stages_run_once_and_every_value_for_every_seed(ran: Any) -> None:
    _, _, done = ran
    low, high = f"kd.lr={LOW}", f"kd.lr={HIGH}"
    assert [*done] == [
        *("base", "sft@1", "sft@2", f"{low}@1", f"{low}@2", f"{high}@1", f"{high}@2"),
        *("kd@1", "kd@2", "kd4@1", "kd4@2", "study", "report"),
    ]
    assert [done[f"{high}@{seed}"].stage["optim"]["lr"] for seed in (1, 2)] == [HIGH, HIGH]


def test_the_best_by_validation_is_kept_whole(ran: Any) -> None:
    _, _, done = ran
    for seed in (1, 2):
        kept, chosen = done[f"kd@{seed}"], done[f"kd.lr={HIGH}@{seed}"]
        assert kept.summary["best"]["chosen"] == 1
        assert kept.summary["chosen"]["fingerprint"] == chosen.fingerprint
        assert kept.summary["response_tokens"] == chosen.summary["response_tokens"]
        for name in ("model.safetensors", "metrics.jsonl", "config.json", "tokenizer.json"):
            assert (kept.folder / name).read_bytes() == (chosen.folder / name).read_bytes(), name
        assert os.path.samefile(kept.folder / "model.safetensors", chosen.folder / "model.safetensors")
    tried = done["kd@1"].summary["best"]["candidates"]
    assert [row["values"] for row in tried] == [{"optim.lr": LOW}, {"optim.lr": HIGH}]
    assert tried == done["kd@2"].summary["best"]["candidates"]
    for row in tried:
        assert row["mean"] == pytest.approx(sum(score for _, score in row["by_seed"]) / 2)
        assert [seed for seed, _ in row["by_seed"]] == [1, 2]


def test_what_comes_after_uses_the_chosen_weights(ran: Any) -> None:
    _, _, done = ran
    assert done["kd4@2"].parents == {"kd@2": done["kd@2"].fingerprint}
    (kd,) = (row for row in Study.load(done["study"].folder).rows if row.name == "KD")
    assert [(one.lr, one.searched) for one in kd.trained or ()] == [(HIGH, {"optim.lr": [LOW, HIGH]})] * 2
    assert kd.seeds == (1, 2)
    lineage = read_json(done["study"].folder / "lineage.json")
    assert [(curve["name"], curve["seed"]) for curve in lineage["curves"]] == [("SFT", 1), ("SFT", 2), ("KD", 1), ("KD", 2)]
    assert [stage["stage"] for stage in lineage["data"]] == ["sft@1", "sft@2", "kd@1", "kd@2"]


def test_the_report_shows_the_sweep_and_that_the_control_had_none(ran: Any) -> None:
    _, out, _ = ran
    report = read_json(out / "report.json")
    (sweep,) = report["sweeps"]
    assert (sweep["name"], sweep["stage"], sweep["by"], sweep["chosen"]) == ("KD", "kd", "validation_nll", 1)
    assert sweep["sentence"].startswith(f"KD: optim.lr {HIGH} was picked out of {LOW} (")
    assert [[curve["seed"] for curve in row["curves"]] for row in sweep["candidates"]] == [[1, 2], [1, 2]]
    told = "KD's optim.lr was searched over 2 values, SFT's was not: this favours KD."
    assert f"This is NOT equal tuning: {told}" in report["headline"]["sentence"]
    assert any(told in caveat for caveat in report["caveats"])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count('aria-label="KD: loss and validation scores by epoch, one line per value of optim.lr.') == 1


def test_chat_speaks_with_the_chosen_one(ran: Any) -> None:
    _, out, done = ran
    assert pick_model(str(out)).folder == done["kd@1"].folder
    assert pick_model(f"{out}:kd.lr={LOW}").folder == done[f"kd.lr={LOW}@1"].folder
    assert as_chosen(done["kd@1"]).stage["prompts"]["max_tokens"] == PROMPTS["max_tokens"]


def test_plan_lists_every_value(ran: Any, tmp_path: Path) -> None:
    path, out, done = ran
    parsed = parse_recipe(recipe(path, [LOW, HIGH]))
    lines = estimate(parsed, out, measure=False).lines
    assert [line.stage for line in lines] == [*done]
    assert {line.state for line in lines} == {"done"}
    (best, _) = (line.cost for line in estimate(parsed, tmp_path / "none", measure=False).lines if line.kind == "best")
    assert (best.parameters or 0) > 0
    assert best.flops is None


def test_the_same_run_again_does_nothing(ran: Any) -> None:
    path, out, done = ran
    assert ages(run(recipe(path, [LOW, HIGH]), out)) == ages(done)


def test_another_value_trains_that_one_alone(ran: Any) -> None:
    path, out, done = ran
    before = ages(done)
    more = run(recipe(path, [LOW, 1e-3, HIGH]), out)
    new = {ident for ident, age in ages(more).items() if before.get(ident) != age}
    assert new == {"kd.lr=0.001@1", "kd.lr=0.001@2", "kd@1", "kd@2", "kd4@1", "kd4@2", "study", "report"}


# What is picked


class OnTest(Best):
    """Broken: looks at the test rows."""

    def score(self, artifact: Artifact) -> float:
        where, data = f"path:{artifact.folder}", self.data
        assert data is not None
        renderer = Renderer(load_tokenizer(where), Prompts(**PROMPTS))
        return mean_nll(load_model(where), list(instruction_pairs(data.examples("test"), renderer, Counts())))


def picks(folder: Path, answers: str | None, *classes: type[Best]) -> list[int]:
    """Which value each of these would pick in a sweep over rows with these test answers."""
    folder.mkdir()
    table = recipe(write_rows(folder / "rows.jsonl", answers), [LOW, HIGH], seeds=(1,))
    table["stage"] = table["stage"][:3]
    parsed = parse_recipe(table)
    done = run_recipe(parsed, folder / "run")
    (best,) = (stage for stage in parsed.stages if isinstance(stage, Best))
    inputs = {ref.target: [done[ref.target]] for ref in best.candidates}
    fields = {name: getattr(best, name) for name in Best.model_fields}
    asked = {cls.__name__: cls.model_construct(**fields) for cls in classes}
    return [one.run(Context(Work(folder / name, "kd"), inputs))["best"]["chosen"] for name, one in asked.items()]


def test_the_test_rows_have_no_say(tmp_path: Path) -> None:
    unlike = "~{}#|" * 14  # nothing that training could have taught: who learned least does best
    as_it_was, changed = (picks(tmp_path / str(i), answers, Best, OnTest) for i, answers in enumerate((None, unlike)))
    assert as_it_was == [1, 1]
    assert changed == [1, 0], "the law must reject a stage that looks at the test rows"


COUNTS: dict[str, Any] = dict.fromkeys(("rows", "steps", "rows_seen", "response_tokens", "tokens", "epochs", "lr"), 1)


def trained(folder: Path, name: str, *figures: dict[str, float], seed: int = 0) -> Artifact:
    """An artifact as training leaves it, as far as picking looks."""
    work = folder / f"work-{name}"
    work.mkdir(parents=True)
    write_text(work / "metrics.jsonl", "".join(json.dumps({"step": i, **line}) + "\n" for i, line in enumerate(figures)))
    (work / "weights").write_text(name)
    stage = {"seed": seed}
    record = Trained(**dict.fromkeys(("by", "start", "data", "prompts", "order"), "x"), seed=seed, **COUNTS).model_dump()
    return Artifact(
        folder / name, name, "sft", "model", f"print of {name}", stage=stage, summary={"steps": 1, "trained": record}
    ).commit(work)


def pick(folder: Path, candidates: list[list[Artifact]], by: str = "validation_rouge_l") -> Artifact:
    refs = [f"stage:c{i}" for i in range(len(candidates))]
    stage = Best.parse({"kind": "best", "name": "kd", "candidates": refs, "by": by})
    assert isinstance(stage, Best)
    inputs = {f"c{i}": artifacts for i, artifacts in enumerate(candidates)}
    return execute(stage, Context(Work(folder / ".work-kd", "kd"), inputs), folder / "kd", "print")


def rouge(*values: float) -> list[dict[str, float]]:
    return [{"validation_rouge_l": value, "validation_nll": value, "epoch": 1.0} for value in values]


@pytest.mark.parametrize(
    ("by", "finals", "chosen"),
    [
        ("validation_rouge_l", (1, 3, 2), 1),
        ("validation_nll", (2, 3, 1), 2),
        ("validation_rouge_l", (2, 2, 1), 0),
        ("validation_nll", (2, 1, 1), 1),
    ],
)
def test_the_last_validation_decides_and_of_equals_the_first(tmp_path: Path, by: str, finals: Any, chosen: int) -> None:
    candidates = [[trained(tmp_path, f"c{i}", *rouge(9 - last, last))] for i, last in enumerate(finals)]
    kept = pick(tmp_path, candidates, by)
    assert kept.summary["best"]["chosen"] == chosen
    assert (kept.folder / "weights").read_text() == f"c{chosen}"
    assert kept.summary["steps"] == 1


def test_one_value_for_all_seeds(tmp_path: Path) -> None:
    """Each seed alone would pick another value; 0.1 + 0.2 + 0.3 must not depend on the order either."""
    first = [trained(tmp_path, f"a@{seed}", *rouge(value), seed=seed) for seed, value in ((1, 0.1), (2, 0.2), (3, 0.3))]
    second = [trained(tmp_path, f"b@{seed}", *rouge(value), seed=seed) for seed, value in ((1, 0.3), (2, 0.1), (3, 0.2))]
    for turn in range(3):
        own_first = [[*seeds[turn:], *seeds[:turn]] for seeds in (first, second)]
        kept = pick(tmp_path / f"{turn}", own_first)
        assert kept.summary["best"]["chosen"] == 0, "equal means: the first"
        assert (kept.folder / "weights").read_text() == f"a@{turn + 1}", "of several seeds, its own"
        assert [seed for seed, _ in kept.summary["best"]["candidates"][0]["by_seed"]] == [1, 2, 3]


def test_nothing_is_picked_where_nothing_was_validated(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"kd: c1 has no validation_nll, so nothing can be picked by it; it needs validation"):
        pick(tmp_path, [[trained(tmp_path, "c0", *rouge(1))], [trained(tmp_path, "c1", {"loss": 1.0})]], "validation_nll")


def test_an_empty_validation_split_is_told_before_any_training(tmp_path: Path) -> None:
    table = recipe(write_rows(tmp_path / "rows.jsonl"), [LOW, HIGH])
    table["data"]["splits"] = {"validation": 0.0, "test": 0.2}
    with pytest.raises(UserError, match=r"kd\.data +the validation split is empty, so there is nothing to pick by"):
        run(table, tmp_path / "run")
    assert not [*(tmp_path / "run" / "artifacts").iterdir()]


def test_a_sweep_that_was_killed_while_copying_goes_on(tmp_path: Path) -> None:
    left = tmp_path / ".work-kd"
    (left / "half").mkdir(parents=True)
    (left / "weights").write_text("of another")
    kept = pick(tmp_path, [[trained(tmp_path, "c0", *rouge(1))]])
    assert (kept.folder / "weights").read_text() == "c0"
    assert not (kept.folder / "half").exists()


def test_links_are_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems without hard links exist."""

    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    kept = pick(tmp_path, [[trained(tmp_path, "c0", *rouge(1))]])
    assert (kept.folder / "weights").read_text() == "c0"
