"""Rows that a server writes: what it is asked, what it costs, what stays secret, how a run that broke off goes on."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from faulty import KEY, Reply, chat, error, serving
from tiny_parts import write_rows

from potstill.commands.plan import estimate
from potstill.core.artifact import Artifact
from potstill.core.errors import RecipeError, UserError
from potstill.recipe.parse import parse_recipe
from potstill.run.runner import run_recipe


def table(folder: Path, url: str, api: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    write_rows(rows)
    splits = {"validation": 0.2, "test": 0.3}
    data = {"kind": "jsonl", "path": str(rows), "language": "en", "context": "context", "splits": splits}
    server = {"url": url, "model": "m", "backoff_s": 0.001, "retries": 2} | (api or {})
    stage = {"name": "written", "kind": "generate", "api": server, "filters": {"repetition": False}}
    stage["sampling"] = {"temperature": 0}
    return {"name": "w", "data": data, "prompts": {"system": "Be brief."}, "stage": [stage | more]}


def run(recipe: dict[str, Any], out: Path) -> Artifact:
    (made,) = run_recipe(parse_recipe(recipe), out).values()
    return made


def lines(artifact: Artifact, name: str = "rows.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (artifact.folder / name).read_text(encoding="utf-8").splitlines()]


def answer(number: int, body: dict[str, Any]) -> dict[str, Any]:
    """Follows from the request alone."""
    return chat(f"{body['messages'][-1]['content'][-12:]} {body['seed'] if body['temperature'] else ''}", usage=(10, 4))


def test_rows_are_asked_and_counted(tmp_path: Path) -> None:
    with serving(answer) as server:
        made = run(table(tmp_path, server.url), tmp_path / "run")
    rows = lines(made)
    assert len(server.asked) == len(rows) == made.summary["answers"] == 25
    assert (made.summary["prompt_tokens"], made.summary["response_tokens"], made.summary["tokens"]) == (250, 100, 350)
    assert made.summary["uncounted"] == 0
    assert made.summary["teacher"] == f"m at {server.url}"
    by_question = {body["messages"][-1]["content"]: body["messages"] for _, body in server.asked}
    for row in rows:
        asked = f"{row['context']}\n\n{row['instruction']}" if row["context"] else row["instruction"]
        system, user = by_question[asked]
        assert (system, user["role"]) == ({"role": "system", "content": "Be brief."}, "user")
        assert row["response"] == asked[-12:].strip()


def test_a_cost_that_is_not_told_is_said_not_guessed(tmp_path: Path) -> None:
    with serving(lambda n, body: chat("x", usage=None)) as server:
        recipe = parse_recipe(table(tmp_path, server.url, budget=300, sampling={"temperature": 0, "max_new_tokens": 30}))
        (made,) = run_recipe(recipe, tmp_path / "run").values()
    assert (made.summary["tokens"], made.summary["uncounted"], made.summary["asked"]) == (0, 10, 10)
    assert "10 answers of unknown cost" in recipe.stages[0].closing(made.summary)


@pytest.mark.parametrize("in_flight", [1, 8])
def test_a_budget_does_not_depend_on_who_answers_first(tmp_path: Path, in_flight: int) -> None:
    def slow(number: int, body: dict[str, Any]) -> Reply:
        return Reply(answer(number, body), delay_s=0.02 * (number % 3))

    with serving(slow) as server:
        sampling = {"temperature": 0, "max_new_tokens": 10}
        made = run(table(tmp_path, server.url, {"in_flight": in_flight}, budget=50, sampling=sampling), tmp_path / "run")
    assert len(server.asked) == made.summary["asked"] == 11  # 11 · 4 are paid, and a twelfth may take 10 more
    assert made.summary["response_tokens"] == 44


def test_a_run_that_broke_off_asks_for_the_rest_alone(tmp_path: Path) -> None:
    """Two rows of two samples are in work. Of 21 answers the last one leaves its row incomplete; three requests are open."""
    hot = {"samples": 2, "sampling": {"temperature": 0.7, "max_new_tokens": 8}}
    all_open, told = threading.Barrier(3, timeout=60), threading.Event()

    def breaking(number: int, body: dict[str, Any]) -> Any:
        if number < 21:
            return answer(number, body)
        all_open.wait()
        if number == 21:
            return Reply(error("gone"), 404, read=told)
        told.wait(60)
        return Reply(answer(number, body), delay_s=0.3)  # the client knows by now that a request has failed

    with serving(breaking) as server:
        url, recipe = server.url, table(tmp_path, server.url, {"in_flight": 4}, **hot)
        with pytest.raises(UserError, match="HTTP 404"):
            run(recipe, tmp_path / "run")
        assert len(server.asked) == 24  # nothing was begun once one had failed
    (journal,) = (tmp_path / "run" / "written").iterdir()
    assert journal.read_bytes().count(b"\n") == 11  # what was in flight and is complete is kept
    with serving(answer, port=int(url.rpartition(":")[2].split("/")[0])) as server:
        made = run(recipe, tmp_path / "run")
        assert len(server.asked) == 2 * (25 - 11)
        whole = run(table(tmp_path, server.url, {"in_flight": 1, "timeout_s": 7.0}, **hot), tmp_path / "whole")
    assert (made.folder / "rows.jsonl").read_bytes() == (whole.folder / "rows.jsonl").read_bytes()
    assert made.fingerprint == whole.fingerprint  # how it is asked decides nothing


def test_the_key_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with serving(lambda n, body: answer(n, body) if n else Reply(error(f"no {KEY}"), 500)) as server:
        run(table(tmp_path, server.url, {"key_env": "TEACHER_KEY"}), tmp_path / "run")
    assert set(server.keys) == {f"Bearer {KEY}"}
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    assert KEY not in "".join(capfd.readouterr())


def test_a_key_in_a_recipe_is_not_repeated(tmp_path: Path) -> None:
    for wrong in ({"key_env": KEY}, {"key": KEY}, {"url": f"https://me:{KEY}@host/v1"}, {"url": f"https://host/v1?key={KEY}"}):
        with pytest.raises(RecipeError) as caught:
            parse_recipe(table(tmp_path, "http://x/v1", wrong))
        assert KEY not in str(caught.value)


def test_what_is_known_before_it_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    wrong = table(tmp_path, "http://127.0.0.1:1/v1", {"key_env": "TEACHER_KEY", "extensions": False})
    wrong["stage"][0] |= {"samples": 2, "sampling": {"top_k": 3}, "filters": {"best": "likelihood"}}
    with pytest.raises(RecipeError) as caught:
        run(wrong, tmp_path / "run")
    for words in ("api.key_env", "TEACHER_KEY is not set", "extensions = true", "api.logprobs = true"):
        assert words in str(caught.value)
    found = estimate(parse_recipe(table(tmp_path, "http://127.0.0.1:1/v1")), tmp_path / "none", measure=False)
    (line,) = found.lines
    assert not found.problems
    assert (line.cost.response_tokens or 0) > 0
    assert line.cost.seconds is None
    assert "is not known" in line.cost.note


def test_a_prompt_too_long_for_the_server_is_left_out_and_counted(tmp_path: Path) -> None:
    def tight(number: int, body: dict[str, Any]) -> Any:
        if "\n\n" in body["messages"][-1]["content"]:
            return Reply(error("maximum context length is 8 tokens"), 400)
        return answer(number, body)

    with serving(tight) as server:
        made = run(table(tmp_path, server.url), tmp_path / "run")
    lost = made.summary["rows_left_out"]["prompt too long for the server"]
    assert lost > 0
    assert lost + len(lines(made)) == 25 == made.summary["asked"]


def test_a_plain_format_is_continued_as_text(tmp_path: Path) -> None:
    said = {"choices": [{"text": "yes", "finish_reason": "stop"}]}
    with serving(lambda n, body: said) as server:
        recipe = table(tmp_path, server.url)
        recipe["prompts"] = {"format": "alpaca"}
        run(recipe, tmp_path / "run")
    assert {path for path, _ in server.asked} == {"/v1/completions"}
    assert all(body["prompt"].startswith("Below is an instruction") for _, body in server.asked)
    assert all(body["prompt"].endswith("### Response:\n") for _, body in server.asked)


def test_cut_answers_are_left_out_and_counted(tmp_path: Path) -> None:
    with serving(lambda n, body: chat("x y", "length" if n % 2 else "stop")) as server:
        made = run(table(tmp_path, server.url, {"in_flight": 1}), tmp_path / "run")
    assert made.summary["filtered"] == {"cut at max_new_tokens": 12}
    assert {row["reason"] for row in lines(made, "left_out.jsonl")} == {"cut at max_new_tokens"}


def test_answers_of_nothing_but_reasoning_are_left_out_under_that_name(tmp_path: Path) -> None:
    def thinks(number: int, body: dict[str, Any]) -> dict[str, Any]:
        found = chat("x y" if number % 2 else "", "stop" if number % 2 else "length")
        found["choices"][0]["message"]["reasoning_content"] = "x or y?"
        return found

    with serving(thinks) as server:
        recipe = table(tmp_path, server.url, {"in_flight": 1})
        made = run(recipe, tmp_path / "run")
    assert made.summary["filtered"] == {"reasoning without an answer": 13}
    assert made.summary["reasoned"] == 25
    assert "25 answers came with reasoning, which is not kept" in parse_recipe(recipe).stages[0].closing(made.summary)
    assert all("x or y?" not in line for line in (made.folder / "rows.jsonl").read_text().splitlines())
