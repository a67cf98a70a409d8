"""--plugin: the user's own components, by the command line alone."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import call

from potstill.commands.plugins import load
from potstill.core.errors import UserError
from potstill.core.types import Example
from potstill.metrics import Metric
from potstill.rewards import Answered, Reward, values_of

REWARD = """
from potstill.rewards import Reward

class Short(Reward, kind="short"):
    \"\"\"Fewer words are better.\"\"\"

    def __call__(self, answers):
        return [1 / (1 + len(answer.text.split())) for answer in answers]
"""
METRIC = """
from potstill.metrics import TextMetric

class Words(TextMetric, kind="word_count"):
    \"\"\"Words of the answer.\"\"\"

    unit = "words"
    title = "Words"

    def __call__(self, answer, example):
        return float(len(answer.split()) + OFFSET)

OFFSET = 0
"""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Registries are the process's own."""
    before = {role: dict(role.kinds) for role in (Reward, Metric)}
    yield
    for role, kinds in before.items():
        for kind in set(role.kinds) - set(kinds):
            del role.kinds[kind]


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(REWARD)
    return file


def test_a_reward_of_the_users_own_is_listed(plugin: Path) -> None:
    listed = call("list", "reward", "--json", "--plugin", str(plugin))
    assert listed.exit_code == 0, listed.output
    assert json.loads(listed.stdout)["reward"]["short"]["summary"] == "Fewer words are better."


def test_without_the_option_the_kind_is_unknown(plugin: Path) -> None:
    assert "short" not in json.loads(call("list", "reward", "--json").stdout)["reward"]


def test_its_content_is_its_version(plugin: Path) -> None:
    assert load(plugin) == ["reward short"]
    first = Reward.kinds["short"].version
    del Reward.kinds["short"]
    load(plugin)
    assert Reward.kinds["short"].version == first > 1
    del Reward.kinds["short"]
    plugin.write_text(REWARD.replace("1 +", "2 +"))
    load(plugin)
    assert Reward.kinds["short"].version != first


STUDY = """
name = "mine"
data = { kind = "jsonl", path = "ROWS", splits = { validation = 0, test = 1 } }
prompts = { max_tokens = 100, max_prompt_tokens = 60 }

[[stage]]
name = "study"
kind = "evaluate"
study = [{ name = "one", model = "path:MODEL" }]
metrics = ["word_count"]
primary = "word_count"
rows = 8
decoding = { max_new_tokens = 4 }
"""


def test_a_changed_file_is_measured_again(family: dict[str, Path], rows_file: Path, tmp_path: Path) -> None:
    recipe, file, out = tmp_path / "mine.toml", tmp_path / "metric.py", tmp_path / "run"
    recipe.write_text(STUDY.replace("ROWS", str(rows_file)).replace("MODEL", str(family["student"])))
    refused = call("check", str(recipe))
    assert refused.exit_code == 2
    assert "word_count" in refused.output
    means: dict[str, float] = {}
    for offset in ("0", "100"):
        file.write_text(METRIC.replace("OFFSET = 0", f"OFFSET = {offset}"))
        Metric.kinds.pop("word_count", None)
        done = call("run", str(recipe), "--out", str(out), "--quiet", "--plugin", str(file))
        assert done.exit_code == 0, done.output
        (made,) = {path.name for path in (out / "artifacts").glob("study-*")} - set(means)
        study = json.loads((out / "artifacts" / made / "study.json").read_text())
        scores = study["rows"][0]["scores"]["word_count"][0]
        means[made] = sum(scores) / len(scores)
    first, second = means.values()
    assert second == pytest.approx(first + 100)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", 'defines no component; write such as `class Short(Reward, kind="short")`'),
        ("x = (", "line 1: SyntaxError: '(' was never closed"),
        ("import potstill\nx = potstill.nothing", "line 2: AttributeError: "),
        ("x = 1\n1 / 0", "line 2: ZeroDivisionError: division by zero"),
        ("from potstill.rewards import Reward\nclass A(Reward): pass", "line 2: class A has no kind"),
        (REWARD.replace('kind="short"', 'kind="steps"'), "TypeError: the reward 'steps' exists already"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        (REWARD.replace(', kind="short"', ""), "line 4: class Short has no kind, so no recipe can name it; write "),
        (REWARD.replace(', kind="short"', "").replace("def", 'kind = "short"\n    def'), "line 4: class Short has no kind"),
        (REWARD.replace('"short"', "3"), 'line 4: TypeError: the kind of class Short must be text in quotes: kind="short"'),
        (REWARD.replace("def", "most = 3\n    def"), "line 4: most has no type; write most: int = … (or float"),
        (REWARD.replace("def", "weight = 3\n    def"), "line 4: weight has no type"),
        (REWARD.replace("def", 'most: int = "x"\n    def'), "line 4: class Short: the default of most is 'x', and must be"),
        (REWARD.replace("def", "most: Thing = 3\n    def").replace("class", "class Thing: pass\nclass", 1), "is of type Thing"),
        (REWARD.replace("def", "title = 3\n    def"), "line 4: class Short: title is 3, and must be text"),
        (REWARD.replace("def", "title: str = ''\n    def"), "line 4: the name title is taken by the component itself"),
        (REWARD.replace("__call__", "value"), "line 4: class Short lacks __call__; write def __call__(self, …)"),
    ],
)
def test_files_that_cannot_be_used(plugin: Path, text: str, message: str) -> None:
    plugin.write_text(text)
    refused = call("list", "--plugin", str(plugin))
    assert refused.exit_code == 2
    assert f"error: --plugin {plugin}: " in refused.output
    assert message in refused.output
    assert "Traceback" not in refused.output
    assert "pydantic" not in refused.output
    assert "short" not in Reward.kinds


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.py", tmp_path):
        refused = call("check", "quickstart", "--plugin", str(path))
        assert refused.exit_code == 2
        assert f"error: --plugin {path}: no such file" in refused.output


def test_running_without_a_sandbox_is_said_aloud(family: dict[str, Path], tmp_path: Path) -> None:
    from potstill.scorers import programs

    recipe, rows = tmp_path / "mine.toml", tmp_path / "rows.jsonl"
    tests = [
        {"text": f"Add {n}.", "code": f"def f(x):\n    return x + {n}", "test_list": [f"assert f(1) == {n + 1}"]}
        for n in range(8)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in tests))
    study = STUDY.replace("jsonl", "mbpp").replace("word_count", "pass_at_1").replace("max_tokens = 100", "max_tokens = 200")
    study = study.replace("max_prompt_tokens = 60", "max_prompt_tokens = 150")
    recipe.write_text(study.replace("ROWS", str(rows)).replace("MODEL", str(family["student"])))
    try:
        checked = call("check", str(recipe), "--unsafe-no-sandbox")
        assert checked.exit_code == 0, checked.output
        assert "WARNING: --unsafe-no-sandbox: programs run with your rights" in checked.stderr
        assert programs.sandbox() == "none"
    finally:
        programs.use(None)


def test_a_reward_of_the_users_own_that_fails_is_named_by_its_line(plugin: Path) -> None:
    plugin.write_text(REWARD.replace("1 / (1 + len(answer.text.split()))", "answer.text.split()[99]"))
    load(plugin)
    answered = Answered(Example("0", "Say hi.", "hi"), "hi", 1, True)
    with pytest.raises(
        UserError, match=r"'short' failed with IndexError: list index out of range \(.*mine\.py, line 8\); mend"
    ):
        values_of(Reward.kinds["short"](), [answered])
