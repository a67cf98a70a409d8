"""What is wrong with rows is said once, with file and line; what is left out is counted."""

import json

from tiny_run import Place

from potstill.stages.training import trained_in_words

EMPTY = "tiny.toml: 1 problem\n  base.data  the train split is empty{}; give it more rows, or set data.splits"
ALL_TRAIN = ("--set", "data.splits={ validation = 0, test = 0 }")
ROW = {"instruction": "What is 1 plus 1?", "response": "It is 2."}
EVALUATE = """
[[stage]]
name = "study"
kind = "evaluate"
study = [{ name = "SFT", model = "stage:sft" }]
metrics = ["rouge_l", "nll"]
decoding = { max_new_tokens = 4 }
"""


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def numbered(count: int, **more: object) -> list[dict[str, object]]:
    return [{**ROW, "instruction": f"What is {i} plus {i % 7}?", **more} for i in range(count)]


def refusal(place: Place, rows: str | bytes, *words: str) -> str:
    place.rows.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    result = place.run("--quiet", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert not [name for name in place.artifacts() if name.startswith("sft")]
    return result.stderr.removeprefix("error: ").removesuffix("\n").replace(str(place.rows), "FILE")


def unread(place: Place, rows: str | bytes, *words: str) -> str:
    """What the preflight says of rows that cannot be read: once, at the data that all stages share."""
    head, told = refusal(place, rows, *words).split("\n", 1)
    assert head == "tiny.toml: 1 problem"
    assert not place.artifacts(), "before anything was trained"
    return told.removeprefix("  base.data  ")


def test_a_missing_column(place):
    told = unread(place, lines(ROW, {"instruction": "What?", "reponse": "That."}))
    assert told == "FILE:2: no column 'response'; did you mean 'reponse'? (columns: instruction, reponse)"


def test_an_empty_file(place):
    assert unread(place, "") == "FILE: has no rows; write one JSON object per line"
    assert unread(place, "\n\n") == "FILE: has no rows; write one JSON object per line"


def test_not_utf8(place):
    told = unread(place, lines(ROW).encode() + '{"instruction": "¿Qué?"}'.encode("latin-1"))
    assert told == "FILE:2: not UTF-8 (byte 0xbf in column 18); save the file as UTF-8"


def test_a_broken_line(place):
    told = unread(place, lines(*numbered(3)) + '{"instruction": "What?"\n')
    assert told == "FILE:4: not valid JSON (Expecting ',' delimiter in column 24); write one JSON object per line"


def test_no_text(place):
    assert unread(place, lines({**ROW, "response": 2})) == "FILE:1: column 'response' holds a number, not text"


def test_a_folder(place):
    place.rows.unlink()
    place.rows.mkdir()
    result = place.run("--quiet")
    assert result.exit_code == 2
    assert result.stderr == f"error: {place.rows}: is a folder; name one file\n"


def test_a_csv_goes_in_and_a_finished_run_comes_out(place):
    table = place.folder / "rows.csv"
    table.write_text("".join(["question;answer\r\n", *(f'"What is {i}; plus 1?";{i + 1}\r\n' for i in range(60))]))
    columns = ("--set", "data.instruction=question", "--set", "data.response=answer")
    where = ("--set", "data.kind=csv", "--set", f"data.path={table}")
    result = place.run("--quiet", *where)
    assert result.exit_code == 2
    told = f"  base.data  {table}:2: no column 'instruction' (columns: question, answer); "
    told += 'set data.instruction = "question" and data.response = "answer"\n'
    assert result.stderr == f"tiny.toml: 1 problem\n{told}"
    assert place.run("--quiet", *where, *columns).exit_code == 0
    assert {name.split("-")[0] for name in place.artifacts()} == {"base", "sft"}


def test_empty_responses_are_left_out_and_counted(place):
    place.rows.write_text(lines(*numbered(50), *numbered(3, response=" ")))
    assert place.run("--quiet", *ALL_TRAIN).exit_code == 0
    summary = json.loads((place.artifact("sft") / "artifact.json").read_text())["summary"]
    assert summary["data"]["dropped"] == {"empty response": 3}
    assert summary["data"]["rows"] == 50


def test_long_rows_are_left_out_and_counted(place):
    rows = numbered(50)
    rows[0]["instruction"] = "why " * 100  # falls into training, by its hash
    rows[1]["response"] = "so " * 100
    place.rows.write_text(lines(*rows))
    assert place.run("--quiet", "--set", "data.splits={ validation = 0, test = 0 }").exit_code == 0
    summary = json.loads((place.artifact("sft") / "artifact.json").read_text())["summary"]
    assert summary["data"]["dropped"] == {"prompt too long": 1, "response too long": 1}
    assert summary["data"]["rows"] == 48
    assert "the longest has 1" in (told := trained_in_words(summary))
    assert "tokens (prompts.max_prompt_tokens and prompts.max_tokens)" in told
    del summary["data"]["dropped"]["response too long"]
    assert "tokens (prompts.max_prompt_tokens)" in trained_in_words(summary)


def test_all_rows_empty(place):
    told = refusal(place, lines(*numbered(5, response="")), *ALL_TRAIN)
    assert told == EMPTY.format(" (5 empty response)")


def test_all_rows_too_long(place):
    told = refusal(place, lines(*numbered(5, response="so " * 100)), "--set", "data.splits={ validation = 0, test = 0 }")
    words = "sft.data  the train split is empty (5 response too long); raise prompts.max_tokens: the longest that does "
    words += "not fit has 128 tokens"
    assert told == f"tiny.toml: 1 problem\n  {words}"


def test_rows_that_are_mostly_too_long_stop_a_run_before_it_begins(place):
    rows = numbered(40)
    for row in rows[:30]:
        row["response"] = "so " * 100
    everything = ("--set", "data.splits={ validation = 0, test = 0 }")
    told = refusal(place, lines(*rows), *everything)
    assert "sft.prompts.max_tokens = 64  train split: 30 of 40 rows are too long, more than most_left_out = 0.5 allows" in told
    assert "the longest that does not fit has 1" in told, "what max_tokens would have to be"
    assert not place.artifacts()
    result = place.run(*everything, "--set", "prompts.most_left_out=1")
    assert result.exit_code == 0
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("sft") and "done in" in line)
    assert "10 of 40 rows, 30 left out: response too long, the longest has 1" in line


def test_one_row_cannot_be_trained_on_and_tested(place):
    place.add(EVALUATE)
    place.rows.write_text(lines(ROW))
    result = place.run("--quiet", *ALL_TRAIN)
    assert result.exit_code == 2
    assert result.stderr == (
        "tiny.toml: 1 problem\n  study.data  the test split is empty; give it more rows, or set data.splits\n"
    )
    assert list((place.out / "artifacts").iterdir()) == []  # said before anything was trained


def test_one_row_can_be_tested_but_does_not_train(place):
    told = refusal(place, lines(ROW), "--set", "data.splits={ validation = 0, test = 0.999 }")
    assert told == EMPTY.format("")
