"""The command line as a user meets it: words, exit codes, and nothing loaded before it is needed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import Place, call

from potstill import __version__, cli
from potstill.core.errors import UserError
from potstill.recipe.parse import load_recipe
from potstill.sandbox.grader import Grader
from potstill.scorers import programs

VERBS = ("quickstart", "show", "check", "plan", "run", "compare", "list", "report", "chat", "serve", "doctor", "sandbox")
HEAVY = ("torch", "transformers", "numpy", "pydantic")
LIBRARIES = ("transformers", "tokenizers", "datasets", "huggingface_hub", "peft")


def command(*words: str, **options) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run([sys.executable, "-m", "potstill", *words], capture_output=True, text=True, **options)


# Help


@pytest.mark.parametrize("words", [(), *((verb,) for verb in VERBS)], ids=lambda words: " ".join(words) or "main")
def test_help_answers_and_loads_nothing_heavy(words):
    script = (
        "import sys\nfrom potstill.cli import main\n"
        f"try: main({[*words, '--help']!r})\nexcept SystemExit as end: code = end.code\n"
        f"print('LOADED', code, *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *help_lines, loaded = done.stdout.splitlines()
    assert loaded == "LOADED 0"
    assert help_lines[0].startswith("Usage:")
    if not words:
        assert all(any(line.split()[:1] == [verb] for line in help_lines) for verb in VERBS)


def test_version():
    assert call("--version").output == f"potstill, version {__version__}\n"


def test_an_unknown_verb_is_the_users_mistake():
    result = call("destil")
    assert result.exit_code == 2
    assert "No such command 'destil'" in result.stderr


# check


def test_check_says_that_all_is_well(place):
    result = call("check", place.recipe)
    first, *notes = result.output.splitlines()
    assert (result.exit_code, first) == (0, f"{place.recipe}: 2 stages, no problem")
    assert all(note.startswith("jsonl: ") for note in notes)


def test_check_for_programs(place):
    result = call("check", place.recipe, "--json")
    assert json.loads(result.stdout) == {"ok": True, "name": "tiny", "stages": ["base", "sft"]}


def test_check_finds_mistakes(place):
    result = call("check", place.recipe, "--set", "sft.optim.lrr=1")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "tiny.toml: 1 problem\n  sft.optim.lrr = 1  no such field; did you mean 'lr'?\n"


def test_check_tells_programs_its_mistakes(place):
    result = call("check", place.recipe, "--json", "--set", "sft.optim.lrr=1")
    assert result.exit_code == 2
    assert json.loads(result.stdout) == {
        "ok": False,
        "problems": [{"place": "sft.optim.lrr", "value": "1", "rule": "no such field; did you mean 'lr'?"}],
    }


def test_a_mistake_in_the_file_is_told_before_models_and_rows_are_looked_at(place):
    told = "tiny.toml: 1 problem\n  sft.optim.lrr = 1  no such field; did you mean 'lr'?\n"
    script = (
        "import sys\nfrom potstill.cli import main\n"
        "for verb in ('plan', 'run'):\n"
        "    try: main([verb, *sys.argv[1:]])\n    except SystemExit as end: print(end.code)\n"
        f"print('LOADED', *[name for name in {LIBRARIES!r} if name in sys.modules])"
    )
    words = [place.recipe, "--set", "sft.optim.lrr=1", "--set", "data.instruction=qestion"]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("2\n2\nLOADED\n", told * 2)
    result = call("check", *words)  # goes on after it has told the same
    assert (result.exit_code, result.stderr.startswith(told)) == (2, True)
    assert "  base.data  " in result.stderr.removeprefix(told)


def test_check_finds_no_file(place):
    result = call("check", place.recipe.replace("tiny", "tyni"))
    told = f"error: {place.folder}/tyni.toml: no such file; did you mean 'tiny.toml'?\n"
    assert (result.exit_code, result.stderr) == (2, told)


def test_check_knows_shipped_recipes_by_name():
    assert call("check", "quickstart").output == "quickstart: 10 stages, no problem\nprimer: language en, es\n"


# plan


def test_check_reads_the_rows(place):
    result = call("check", place.recipe, "--set", "data.instruction=qestion")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"base.data  {place.rows}:1: no column 'qestion'" in result.stderr
    place.rows.write_text(place.rows.read_text().replace("What is 50", "\\n", 1).replace('"It is 51."', "51", 1))
    assert f"  base.data  {place.rows}:51: " in call("check", place.recipe).stderr, "row 51 as well as the first"


# show


def test_show_prints_a_recipe_to_start_from(tmp_path):
    result = call("show", "quickstart")
    assert result.exit_code == 0
    (tmp_path / "mine.toml").write_text(result.stdout, encoding="utf-8")
    assert call("check", str(tmp_path / "mine.toml")).exit_code == 0


def test_show_knows_what_there_is():
    result = call("show", "quickstrat")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no such recipe (shipped: paper/bugnet-qwen2, " in result.stderr


def test_plan_for_people(place):
    result = call("plan", place.recipe, "--out", str(place.out))
    assert result.exit_code == 0
    assert "tiny: 2 of 2 stages to do" in result.output
    assert not place.out.exists()


def test_plan_for_programs(place, finished):
    rows = json.loads(call("plan", place.recipe, "--json").stdout)
    assert [(row["stage"], row["state"], row["steps"]) for row in rows] == [("base", "to do", 2), ("sft", "to do", 4)]
    assert all(row["parameters"] > 0 and row["flops"] > 0 and row["memory_bytes"] > 0 for row in rows)
    rows = json.loads(call("plan", finished.recipe, "--json", "--out", str(finished.out)).stdout)
    assert [row["state"] for row in rows] == ["done", "done"]


# list


def test_list_names_every_role():
    found = json.loads(call("list", "--json").stdout)
    assert set(found) == {"stage", "source", "divergence", "init", "metric", "reward", "exporter"}
    assert {"pretrain", "sft", "distill", "quantize", "evaluate", "export", "report"} <= set(found["stage"])


@pytest.mark.parametrize("role", ["divergence", "divergences"])
def test_list_one_role(role):
    result = call("list", role)
    assert result.exit_code == 0
    assert all(kind in result.output for kind in ("forward_kl", "reverse_kl", "generalised_jsd", "beta"))
    assert "pretrain" not in result.output


def test_list_is_one_line_a_kind(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = call("list").output.splitlines()
    assert len(lines) <= 80
    assert max(map(len, lines)) <= 80
    for kinds in json.loads(call("list", "--json").stdout).values():
        assert all(any(line.startswith(f"  {kind} ") for line in lines) for kind in kinds)


def test_list_of_a_kind_shows_its_fields():
    result = call("list", "sft")
    assert result.exit_code == 0
    assert all(field in result.output for field in ("model", "optim.lr", "adapter.targets", "validation.times"))
    assert "distill" not in result.output
    found = json.loads(call("list", "sft", "--json").stdout)
    assert {role: list(kinds) for role, kinds in found.items()} == {"stage": ["sft"]}


@pytest.mark.parametrize("wrong, meant", [("distil", "distill"), ("ggfu", "gguf"), ("stagez", "stage"), ("rouge", "rouge_l")])
def test_list_suggests_roles_and_kinds(wrong, meant):
    result = call("list", wrong)
    assert result.exit_code == 2
    assert f"did you mean '{meant}'?" in result.stderr


def test_list_nonsense():
    result = call("list", "divergance")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: no role and no kind 'divergance'; did you mean 'divergence'? "
        "(roles: stage, source, divergence, init, metric, reward, exporter)\n"
    )


# doctor


def test_doctor():
    rows = json.loads(call("doctor", "--json").stdout)
    assert {"python", "potstill", "torch", "memory", "disk here", "GPU"} <= {row["name"] for row in rows}
    assert all(row["remedy"] for row in rows if row["ok"] is False)
    assert call("doctor").exit_code == 0


def test_doctor_attacks_the_sandboxes():
    rows = {row["name"]: row for row in json.loads(call("doctor", "--json").stdout) if row["name"].startswith("sandbox")}
    assert {"sandbox namespaces", "sandbox bubblewrap"} <= set(rows)
    for row in rows.values():
        assert row["ok"] is (all(probe["held"] for probe in row["probes"]) if row["probes"] else row["ok"])
        assert {"what", "held", "found"} == set().union(*row["probes"]) or not row["probes"]
    if any(row["ok"] for row in rows.values()):
        told = call("doctor").stdout
        assert "trial of the sandbox" in told
        assert "reads no secret" in told


def test_doctor_names_what_does_not_hold(monkeypatch):
    from potstill.sandbox import trial
    from potstill.sandbox.weak import Weak

    monkeypatch.setattr(trial, "NAMES", ("none",))
    monkeypatch.setattr(trial, "made", lambda name, workers=None: Weak())
    rows = [row for row in json.loads(call("doctor", "--json").stdout) if row["name"].startswith("sandbox")]
    weak, none = rows
    assert weak["ok"] is False
    assert "does not hold: reads no secret: read " in weak["found"]
    assert (none["ok"], none["found"]) == (False, "none is safe here: programs that models write are not run")
    assert "✗ does not hold" in call("doctor").stdout


# What is not there


@pytest.mark.parametrize("words", [("report",), ("chat", "--prompt", "hi")], ids=lambda words: words[0])
def test_no_such_run(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(words[0], "nothing", *words[1:])
    told = "error: nothing: no run there; give a folder such as runs/quickstart\n"
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", told)


def test_report_of_a_run_that_began_nothing(place):
    (place.out / "artifacts").mkdir(parents=True)
    result = call("report", str(place.out))
    told = f"error: {place.out}: the run has not begun its first stage; run its recipe again\n"
    assert (result.exit_code, result.stderr) == (2, told)


def test_report_of_a_run_without_one(finished):
    result = call("report", str(finished.out))
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {finished.out}: the recipe has no report stage; add [[stage]] kind = 'report' with study = 'stage:…'\n"
    )


# run


def test_run_leaves_artifacts(finished):
    assert [name.partition("-")[0] for name in finished.artifacts()] == ["base", "sft"]
    assert not list(finished.out.glob("artifacts/.work-*"))
    manifest = json.loads((finished.artifact("sft") / "artifact.json").read_text())
    assert manifest["summary"]["steps"] == 4
    assert manifest["summary"]["data"]["dropped"] == {}
    assert not (finished.artifact("sft") / "checkpoints").exists()


def test_run_again_is_done_already(place):
    first = place.run()
    assert first.exit_code == 0, first.output
    assert "base           pretrain" in first.stderr
    assert "sft            done in 0:0" in first.stderr
    again = place.run()
    assert (again.exit_code, again.stderr) == (0, "2 of 2 stages are done already\n")
    assert again.stdout == "".join(f"{name:<14} {place.artifact(name)}\n" for name in ("base", "sft"))


def test_a_change_redoes_only_what_depends_on_it(place):
    place.run("--quiet")
    base, sft = place.artifacts()
    assert place.run("--set", "sft.optim.steps=3").stderr.startswith("1 of 2 stages are done already\n")
    assert len(place.artifacts()) == 3
    assert base in place.artifacts()
    assert sft in place.artifacts(), "what was made before stays"
    assert "are done already" not in place.run("--set", "base.optim.steps=1").stderr
    again = place.run("--set", "sft.optim.steps=3", "--set", "name=other").stderr
    assert again.startswith("2 of 2 stages are done already\n")
    assert "is made again" not in again
    place.rows.write_text(place.rows.read_text() + '{"instruction": "One more?", "response": "Yes."}\n')
    assert "are done already" not in place.run().stderr


def test_rows_may_move(place):
    place.run("--quiet")
    moved = place.rows.rename(place.folder / "moved.jsonl")
    assert place.run("--set", f"data.path={moved}").stderr == "2 of 2 stages are done already\n"


@pytest.mark.parametrize("text", ["", "[]", "ÿ"])
def test_damaged_memory_of_hashes_is_made_anew(place, text):
    place.run("--quiet")
    (place.out / "hashes.json").write_text(text, encoding="latin-1")
    assert place.run().stderr == "2 of 2 stages are done already\n"
    assert json.loads((place.out / "hashes.json").read_text())


def test_quiet_and_json(place):
    result = place.run("--quiet", "--json")
    assert result.stderr == ""
    assert json.loads(result.stdout) == {name: str(place.artifact(name)) for name in ("base", "sft")}


def test_chat_answers_once(finished):
    result = call("chat", f"{finished.out}:sft", "--prompt", "What is 3 plus 3?", "--max-new-tokens", "5")
    assert result.exit_code == 0
    assert result.output.endswith("\n")
    assert call("chat", str(finished.out), "--prompt", "hi", "--max-new-tokens", "2", "--temperature", "1").exit_code == 0


def test_chat_with_an_unknown_model(finished):
    result = call("chat", f"{finished.out}:stf", "--prompt", "hi")
    told = f"error: {finished.out}: no model 'stf'; did you mean 'sft'? (it has: base, sft)\n"
    assert (result.exit_code, result.stderr) == (2, told)


def test_chat_with_a_question_that_is_too_long(finished):
    result = call("chat", f"{finished.out}:sft", "--prompt", "What is 3 plus 3? " * 100)
    assert result.exit_code == 2
    assert (
        result.stderr == "error: that is longer than the 128 tokens of this conversation; start again with less\n"
    )  # all it has
    remedy = "start again with less, or with a larger --context"
    result = call("chat", f"{finished.out}:sft", "--context", "64", "--prompt", "What is 3 plus 3? " * 100)
    assert result.stderr == f"error: that is longer than the 64 tokens of this conversation; {remedy}\n"


def test_tensorboard(place):
    pytest.importorskip("tensorboard")
    assert place.run("--quiet", "--set", 'log=["tensorboard"]').exit_code == 0
    (file,) = (place.artifact("sft") / "tensorboard").glob("events.out.tfevents.*")
    assert b"grad_norm" in file.read_bytes()


# Several processes, and stops


def test_a_run_in_use_says_by_whom(place):
    hold = (
        "import sys\nfrom pathlib import Path\nfrom potstill.core.artifact import file_lock\n"
        "out = Path(sys.argv[1])\nout.mkdir(parents=True, exist_ok=True)\nwith file_lock(out / '.lock', out):\n"
        "    print('held', flush=True)\n    sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(place.out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        result = place.run()
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {place.out} is in use by process {holder.pid} on ")
        assert result.stderr.endswith("; wait, or choose --out\n")
        holder.kill()  # however the holder ends, its lock ends with it
    assert place.run("--quiet").exit_code == 0


def test_a_stopped_run_saves_and_says_so(place):
    long = ["--set", "sft.optim.steps=2000", "--quiet"]
    words = [sys.executable, "-m", "potstill", "run", place.recipe, "--out", str(place.out), *long]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment) as process:
        deadline = time.monotonic() + 60
        while not any(path.read_text().count("\n") > 2 for path in place.out.glob("artifacts/.work-sft-*/metrics.jsonl")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    step = int(told.partition("stopped at step ")[2].split()[0])
    assert told == (
        "stopping: saving first (Ctrl-C again to stop at once)\n"
        f"sft: stopped at step {step} of 2000; saved, run the same command again to go on\n"
    )
    (state,) = place.out.glob("artifacts/.work-sft-*/checkpoints/step-*/state.json")
    assert json.loads(state.read_text())["step"] == step


# Disks that refuse


def test_a_run_folder_below_a_file(place):
    out = place.rows / "run"
    result = call("run", place.recipe, "--out", str(out))
    told = f"error: run folder {out}: cannot write {out} (Not a directory); choose another folder with --out\n"
    assert (result.exit_code, result.stderr) == (2, told)


def test_a_run_folder_that_is_a_file(place):
    result = call("run", place.recipe, "--out", str(place.rows))
    told = f"error: run folder {place.rows}: cannot write {place.rows} (File exists); choose another folder with --out\n"
    assert (result.exit_code, result.stderr) == (2, told)


def work_folder(place: Place, stage: str) -> Path:
    """Where a stage that is not done yet will work."""
    from potstill.recipe.parse import load_recipe
    from potstill.run.graph import plan

    item = next(item for item in plan(load_recipe(place.recipe), place.out) if item.node.id == stage)
    return item.folder.with_name(f".work-{item.folder.name}")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("file", ["tokens/ids.u32", ".artifact.json.tmp"])
def test_a_full_disk(place, file):
    full = work_folder(place, "sft") / file
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")
    result = place.run("--quiet")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: sft: no space left on the disk; free some, what was finished and the last checkpoint are kept: "
        "run the same command again to go on\n"
    )
    assert [name.partition("-")[0] for name in place.artifacts()] == ["base"]
    full.unlink()  # somebody made room
    assert place.run("--quiet").exit_code == 0
    assert [name.partition("-")[0] for name in place.artifacts()] == ["base", "sft"]


# Our own mistakes


def test_a_crash_of_ours_shows_where(place):
    script = (
        "import sys\nfrom potstill.stages import Stage\nfrom potstill.cli import main\n"
        "class Broken(Stage, kind='broken'):\n    def run(self, context):\n        return 1 / 0\n"
        "main()"
    )
    recipe = place.folder / "broken.toml"
    recipe.write_text('name = "broken"\n[[stage]]\nname = "it"\nkind = "broken"\n')
    words = ["run", str(recipe), "--out", str(place.out), "--quiet"]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


def test_a_mistake_of_the_users_shows_no_traceback(place):
    done = command("run", place.recipe, "--set", "sft.optim.lrr=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "tiny.toml: 1 problem\n  sft.optim.lrr = 1  no such field; did you mean 'lr'?\n"


def test_the_quickstart_names_what_comes_next_and_says_where_no_sandbox_is_safe(capsys: pytest.CaptureFixture[str]) -> None:
    assert any(stage.kind == "grpo" for stage in load_recipe(cli.shipped(f"{cli.GRPO_RECIPE}.toml")).stages)

    def none() -> Grader:
        raise UserError("no sandbox is safe here: tried namespaces")

    try:
        programs.use(none)
        cli._say_next({})
    finally:
        programs.use(None)
    first, second = capsys.readouterr().out.splitlines()
    assert f"potstill run {cli.GRPO_RECIPE} " in first
    assert second == "not here yet: no sandbox is safe here: tried namespaces"
