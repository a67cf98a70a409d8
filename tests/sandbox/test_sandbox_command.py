"""`potstill sandbox`: files in, one line of JSON out."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from potstill.cli import main

HEAVY = ("torch", "transformers", "numpy", "pydantic", "rich", "datasets")


def call(*words):
    return CliRunner().invoke(main, ["sandbox", *map(str, words)], prog_name="potstill")


@pytest.fixture
def files(tmp_path):
    def write(**texts):
        for name, text in texts.items():
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return tmp_path

    return write


def one_line(result):
    assert result.stdout.count("\n") == 1, result.stdout
    found = json.loads(result.stdout)
    assert list(found) == ["verdict", "reason", "wall_s"]
    assert isinstance(found["wall_s"], float)
    return found["verdict"], found["reason"]


@pytest.mark.parametrize(
    "program, outcome, reason",
    [
        ("print(int(input()) + 1)", "pass", ""),
        ("print(int(input()) + 2)", "fail", "line 1: expected '42', printed '43'"),
        ("print(41 / 0)", "crash", "status 1: 'ZeroDivisionError: division by zero'"),
        ("while True: pass", "timeout", "ran longer than 0.5 s"),
        ("x = bytearray(1 << 30)", "memory", "needed more than 256 MiB"),
        ("while True: print('x' * 9999)", "output_limit", "printed more than 1024 KiB"),
        ("print(é)", "crash", "status 1: \"NameError: name 'é' is not defined\""),
        ("", "fail", "line 1: expected '42', printed nothing"),
    ],
)
def test_a_program_by_what_it_prints(files, backend, program, outcome, reason):
    folder = files(program=program, given="41\n", wanted="42\n")
    words = (folder / "program", "--stdin", folder / "given", "--expect", folder / "wanted", "--backend", backend.name)
    result = call(*words, "--time-s", 0.5, "--memory-mb", 256, "--json")
    assert one_line(result) == (outcome, reason)
    assert (result.exit_code, result.stderr) == (0, "")


def test_a_program_by_asserts(files, backend):
    folder = files(program="def f(x): return x + 1", good="assert f(1) == 2\n", bad="assert f(1) == 3")
    words = (folder / "program", "--backend", backend.name, "--json", "--tests")
    assert one_line(call(*words, folder / "good")) == ("pass", "")
    assert one_line(call(*words, folder / "bad"))[0] == "fail"


def test_for_a_person(files, backend):
    folder = files(program="print(1)", wanted="2")
    result = call(folder / "program", "--expect", folder / "wanted", "--backend", backend.name)
    verdict, seconds, unit, *reason = result.stdout.split()
    assert (verdict, unit, " ".join(reason)) == ("fail", "s", "line 1: expected '2', printed '1'")
    assert float(seconds) >= 0


def test_many_programs_in_their_order(files, backend):
    jobs = [
        {"id": "slow", "program": "import time; time.sleep(0.3); print(1)", "stdin": "", "expected": "1"},
        {"id": 2, "program": "print(input())", "stdin": "é\n", "expected": "é\n"},
        {"id": "2", "program": "print(2)", "expected": "3"},
        {"id": "f", "program": "def f(x): return x", "tests": "assert f(1) == 1"},
        {"id": "g", "program": "def f(x): return x", "tests": ["assert f(1) == 1", "assert f(1) == 2"]},
        {"id": "surrogate", "program": "print('\ud800')", "stdin": "", "expected": "1", "source": "ignored"},
    ]
    folder = files(jobs="\ufeff" + "\n".join([*map(json.dumps, jobs), ""]))  # as editors on Windows begin a file
    result = call("--jobs", folder / "jobs", "--backend", backend.name, "--workers", 2)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [list(line) for line in lines] == [["id", "verdict", "reason", "wall_s"]] * 6
    assert [line["id"] for line in lines] == ["slow", 2, "2", "f", "g", "surrogate"]
    assert [line["verdict"] for line in lines] == ["pass", "pass", "fail", "pass", "fail", "crash"]
    assert result.exit_code == 0


def test_it_starts_without_what_is_heavy(files, backend):
    folder = files(program="print(1)", wanted="1")
    words = ["sandbox", str(folder / "program"), "--expect", str(folder / "wanted"), "--json", "--backend", backend.name]
    script = (
        "import sys\nfrom potstill.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit as end: code = end.code\n"
        f"print('LOADED', code, *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    verdict, loaded = done.stdout.splitlines()
    assert json.loads(verdict)["verdict"] == "pass"
    assert loaded == "LOADED 0"


def test_without_a_sandbox_it_says_so(files):
    folder = files(program="print(1)", wanted="1")
    result = call(folder / "program", "--expect", folder / "wanted", "--json", "--unsafe-no-sandbox")
    assert one_line(result) == ("pass", "")
    assert result.stderr.startswith("WARNING: --unsafe-no-sandbox: programs run with your rights")


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "give FILE, or --jobs F: one of the two"),
        (("program", "--jobs", "jobs"), "give FILE, or --jobs F: one of the two"),
        (("--jobs", "jobs", "--expect", "wanted"), "--jobs brings its own tests; leave --stdin, --expect and --tests out"),
        (("program",), "give what FILE must print (--expect F), or assert tests (--tests F): one of the two"),
        (
            ("program", "--expect", "wanted", "--tests", "good"),
            "give what FILE must print (--expect F), or assert tests (--tests F): one of the two",
        ),
        (
            ("program", "--stdin", "wanted", "--tests", "good"),
            "--stdin goes with --expect; assert tests call the program's functions",
        ),
        (("nothing", "--expect", "wanted"), "{nothing}: No such file or directory"),
        (("program", "--expect", "nothing"), "{nothing}: No such file or directory"),
        (("latin", "--expect", "wanted"), "{latin}: no UTF-8 at byte 1; save the file as UTF-8"),
        (("program", "--tests", "broken"), "{broken}: tests: line 1: '(' was never closed; they must be Python statements"),
        (("program", "--expect", "wanted", "--time-s", "0"), "time_s = 0.0: must be a number from 0.01 to 3600"),
        (("program", "--expect", "wanted", "--time-s", "nan"), "time_s = nan: must be a number from 0.01 to 3600"),
        (("program", "--expect", "wanted", "--memory-mb", "8"), "memory_mb = 8: must be a whole number from 32 to 1048576"),
        (
            ("program", "--expect", "wanted", "--backend", "none"),
            "--backend none is no sandbox; say --unsafe-no-sandbox if you mean it",
        ),
        (
            ("program", "--expect", "wanted", "--backend", "namespaces", "--unsafe-no-sandbox"),
            "--backend namespaces is a sandbox and --unsafe-no-sandbox is none; give one of the two",
        ),
        (("--jobs", "misspelt"), "{misspelt}: no line is a job; line 1: no key 'stdinn'; did you mean 'stdin'?"),
        (("--jobs", "empty"), "{empty}: no jobs; each line is an object with id, program, stdin and expected, or tests"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, tuple) else "",
)
def test_bad_input(files, words, message):
    folder = files(
        program="print(1)",
        wanted="1",
        good="assert f(1)",
        broken="assert f(",
        latin=b"x\xe9",
        jobs="{}",
        empty="\n",
        misspelt=json.dumps({"id": 1, "program": "print(input())", "stdinn": "5", "expected": "5", "note": "mine"}),
    )
    names = ("program", "wanted", "good", "broken", "latin", "jobs", "empty", "misspelt", "nothing")
    result = call(*[folder / word if word in names else word for word in words])
    message = message.format(**{name: folder / name for name in names})
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "no JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[]", "must be an object with id, program, stdin and expected, or tests"),
        ('{"program": "", "expected": ""}', "no `id`"),
        ('{"id": 1, "expected": ""}', "no `program`"),
        ('{"id": 1, "program": ""}', "needs `expected` (with `stdin`), or `tests`: one of the two"),
        (
            '{"id": 1, "program": "", "expected": "", "tests": ""}',
            "needs `expected` (with `stdin`), or `tests`: one of the two",
        ),
        ('{"id": true, "program": "", "expected": ""}', "`id` must be text or a whole number, not true"),
        ('{"id": 1, "program": 3, "expected": ""}', "`program` must be text, not 3"),
        ('{"id": 1, "program": "", "expected": 42}', "`expected` must be text, not 42"),
        ('{"id": 1, "program": "", "expected": "", "stdin": null}', "`stdin` must be text, not null"),
        ('{"id": 1, "program": "", "tests": [1]}', "`tests` must be text, or a list of texts"),
        ('{"id": 1, "program": "", "tests": "f("}', "tests: line 1: '(' was never closed; they must be Python statements"),
        ('{"id": 1, "program": "", "tests": ""}', "a program without tests cannot be judged; give it cases or asserts"),
    ],
)
def test_a_line_that_is_no_job_is_abstained_from_and_the_others_are_judged(files, backend, line, message):
    job = {"id": "good", "program": "print(1)", "expected": "1"}
    folder = files(jobs=f"{json.dumps(job)}\n\n{line}\n{json.dumps(job)}\n")
    result = call("--jobs", folder / "jobs", "--backend", backend.name)
    first, bad, last = map(json.loads, result.stdout.splitlines())
    assert [(found["id"], found["verdict"]) for found in (first, last)] == [("good", "pass")] * 2
    assert (bad["verdict"], bad["reason"]) == ("abstain", f"line 3: {message}")
    assert bad["id"] == (1 if '"id": 1' in line else None)
    assert result.stderr == f"1 of 3 lines are no jobs, and get the verdict abstain; the first: line 3: {message}\n"
    assert result.exit_code == 3
