"""What `plan` says: readable at any width, and of the memory that a stage takes."""

import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console
from tiny_run import call

from potstill.commands.plan import Line, Plan, estimate, print_plan
from potstill.core.artifact import file_lock, held_by
from potstill.data.store import to_raise
from potstill.metrics.decode_speed import DecodeSpeed
from potstill.metrics.rouge_l import RougeL
from potstill.recipe.parse import load_recipe
from potstill.stages.outlook import Cost, Outlook, RowsOf
from potstill.stages.training import Validation

WIDTHS = (60, 80, 100, 140)


def printed(plan: Plan, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_plan(plan, console)
    return console.file.getvalue().splitlines()


@pytest.fixture
def large() -> Plan:
    """Every column at its widest."""
    rows = RowsOf("train", 227, {"response too long": 21}, 3, 41.0, 18.0, 110, 60, 131, keys=9)
    cost = Cost(
        3_090_000_000, 123_456, 987_654_321, 123_456_789, 1e21, 360_000.0, 999_000_000_000, 12_300_000_000, rows=(rows,)
    )
    names = ("teacher", "a-stage-with-a-very-long-name-indeed@2147483647", "kd.lr=0.0001,ratio=0.9@1")
    return Plan("wide", tuple(Line(name, "distill", "to do", 1, cost, too_large=True) for name in names))


@pytest.mark.parametrize("width", WIDTHS)
def test_no_figure_is_cut_at_any_width(large: Plan, width: int) -> None:
    lines = printed(large, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    for figure in ("3.09 B", "123,456", "988 M", "100:00:00", "999 GB", "12.3 GB"):
        assert text.count(figure) >= len(large.lines), figure
    assert "".join(text.split()).count("a-stage-with-a-very-long-name-indeed@2147483647") or "a-stage" in text


def test_rows_left_out_are_said_with_the_longest(large: Plan) -> None:
    text = " ".join(" ".join(printed(large, 100)).split())
    assert "train: 227 of 248 rows (left out: 21 response too long, the longest 131 tokens), 3 contexts shortened" in text
    assert "41 + 18 tokens a row, 110 at most" in text


def test_what_does_not_fit_is_marked(large: Plan) -> None:
    text = " ".join(" ".join(printed(large, 100)).split())
    assert "! teacher needs about 999 GB of memory, and this machine has" in text


def test_a_plan_is_kept_and_a_done_stage_shows_what_it_took(place) -> None:
    """Memory and time are compared on larger models by benchmarks/plan.py: here nearly all memory is the test's own."""
    planned = {line.stage: line.cost for line in estimate(load_recipe(place.recipe), place.out, measure=True).lines}
    assert place.run("--quiet").exit_code == 0
    for row in json.loads(call("plan", place.recipe, "--out", str(place.out), "--json").stdout):
        foreseen = planned[row["stage"]]
        assert row["state"] == "done"
        assert (foreseen.seconds or 0) > 0
        assert foreseen.steps == row["steps"]
        assert foreseen.tokens == pytest.approx(row["tokens"], rel=0.1)


HUB = """
name = "hub"
data = { kind = "jsonl", path = "ROWS" }
prompts = { max_tokens = 8, max_prompt_tokens = 4 }

[[stage]]
name = "sft"
kind = "sft"
model = "hf:HuggingFaceTB/SmolLM2-135M-Instruct"
per_seed = true
optim = { steps = 4, batch_size = 8 }

[[stage]]
name = "study"
kind = "evaluate"
study = [{ name = "SFT", model = "stage:sft" }, { name = "Base", model = "hf:HuggingFaceTB/SmolLM2-135M-Instruct" }]
metrics = ["rouge_l"]
"""


@pytest.fixture
def out_of_reach(place, monkeypatch):
    """The tiny rows under a model whose tokenizer is not here; `check` on it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place.folder / "nothing"))
    recipe = place.folder / "hub.toml"
    recipe.write_text(HUB.replace("ROWS", str(place.rows)))
    return lambda *words: call("check", str(recipe), *words)


def test_lengths_guessed_from_characters_refuse_nothing(out_of_reach, place) -> None:
    rows = [{"instruction": f"What is {i}?", "response": "A number among many others. " * 9} for i in range(60)]
    place.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert out_of_reach().exit_code == 0, out_of_reach().output


def test_check_plan_and_run_end_alike_where_the_hub_is_away(out_of_reach, place) -> None:
    recipe = place.folder / "hub.toml"
    rows = [{"instruction": f"What is {i}?", "response": "A number."} for i in range(60)]
    place.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (out_of_reach().exit_code, call("plan", str(recipe), "--out", str(place.out)).exit_code) == (0, 0)
    recipe.write_text(recipe.read_text().replace("hf:HuggingFaceTB/SmolLM2-135M-Instruct", "hf:nobody/unheard-of"))
    for words in ((), ("--json",), ("--gpus", "8")):
        planned = call("plan", str(recipe), "--out", str(place.out), *words)
        assert planned.exit_code == 2, words
        assert "! sft.model = 'hf:nobody/unheard-of'" in " ".join(planned.output.split()), words
    assert out_of_reach().exit_code == call("run", str(recipe), "--out", str(place.out)).exit_code == 2


def test_rows_that_cannot_be_read_are_no_fault_of_the_study_models(out_of_reach, place) -> None:
    place.rows.write_text('{"instruction": "What is it?"\n')
    told = out_of_reach()
    assert told.exit_code == 2
    assert "1 problem" in told.output


def test_check_and_plan_tell_of_languages_and_near_repeats(place) -> None:
    words = [letter * 5 for letter in "abcdefghijklmno"]
    asked = [" ".join(["What is", *words[n:], "and", *words[:n][::-1], "in the"]) for n in range(len(words))]
    rows = [{"instruction": f"{each} {end}?", "response": "A word."} for each in asked for end in ("pot", "pots")]
    place.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    room = ("--set", "prompts.max_tokens=120", "--set", "prompts.max_prompt_tokens=100")
    for verb in ("check", "plan"):
        told = " ".join(call(verb, place.recipe, *room, *(("--out", str(place.out)) if verb == "plan" else ())).stdout.split())
        assert "jsonl: language en" in told, verb
        assert "are nearly repeated by training rows" in told, verb


def test_where_stages_read_other_rows_each_line_names_its_stages(place) -> None:
    longer = "A number among many others. " * 30
    rows = [{"instruction": f"¿Cuánto es {i}?", "response": longer if i < 5 else "Un número."} for i in range(60)]
    (place.folder / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert "base" not in call("check", place.recipe).stdout.partition("\n")[2], "both read the same rows"
    other = ("--set", f"sft.data={{ kind = 'jsonl', path = '{place.folder / 'other.jsonl'}', language = 'es' }}")
    _, *lines = call("check", place.recipe, *other, "--set", "prompts.most_left_out=0.9").stdout.splitlines()
    assert any(line.startswith("base: jsonl: language en") for line in lines), lines
    assert any(line.startswith("sft: jsonl: language es") for line in lines), lines
    (lost,) = (line for line in lines if "left out" in line and "train" in line)
    assert lost.startswith("sft: train: ")


@pytest.fixture
def seconds(place):
    """Planned seconds of a stage with these fields: passes are timed once, so that plans differ by the fields alone."""
    place.add("""
[[stage]]
name = "study"
kind = "evaluate"
study = [{ name = "SFT", role = "sft", model = "stage:sft" }, { name = "Base", role = "base", model = "stage:base" }]
""")
    stages = {stage.name: stage for stage in load_recipe(place.recipe).stages}
    known = Outlook(measure=True)

    def of(name: str, seeds: int = 1, **fields: object) -> float:
        outlook = Outlook(measure=True, seeds=seeds)
        outlook.share(known)
        outlook.add(stages["base"])
        outlook.add(stages["sft"].model_copy(update={"per_seed": True}))
        found = stages[name].model_copy(update=fields).cost(outlook).seconds
        assert found is not None
        return found

    return of


def test_every_seed_of_a_study_takes_its_time(seconds) -> None:
    one, three, five = (seconds("study", seeds=n) for n in (1, 3, 5))
    assert one < three
    assert five - three == pytest.approx(three - one)


def test_tokens_of_a_decoding_speed_are_planned(seconds) -> None:
    without, few, many = (
        seconds("study", metrics=metrics)
        for metrics in ((RougeL(),), (RougeL(), DecodeSpeed(new_tokens=8)), (RougeL(), DecodeSpeed(new_tokens=18)))
    )
    assert (many - without) / (few - without) == pytest.approx(102 / 52)  # 5 repeats of n + 2 tokens, and 2


def test_validation_takes_its_time(seconds) -> None:
    none, one, three = (seconds("sft", validation=Validation(times=times)) for times in (0, 1, 3))
    assert none < one
    assert three - none == pytest.approx(2 * (one - none))  # of times + 1 validations


def test_a_folder_in_use_is_not_offered_for_deletion(tmp_path: Path) -> None:
    assert held_by(tmp_path / ".lock") is None
    with file_lock(tmp_path / ".lock", tmp_path):
        holder = held_by(tmp_path / ".lock")
        assert holder is not None
        assert holder.startswith(f"process {os.getpid()} on ")
    assert held_by(tmp_path / ".lock") is None


def test_the_remedy_for_rows_that_are_too_long_names_the_field_that_lets_them_in() -> None:
    assert to_raise({"prompt too long": 3}, 90) == "prompts.max_prompt_tokens: the longest that does not fit has 90 tokens"
    assert to_raise({"response too long": 3}) == "prompts.max_tokens"
    assert to_raise({"prompt too long": 1, "response too long": 3}) == "prompts.max_prompt_tokens and prompts.max_tokens"
    assert to_raise({"empty response": 2}, 90) == ""
