"""Every message is in our words, for every field of every component; and names that are half remembered find their field."""

import copy
import datetime
import itertools
import math
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from potstill.core.component import Component, Settings
from potstill.core.errors import RecipeError
from potstill.divergences import Divergence
from potstill.exporters import Exporter
from potstill.inits import Init
from potstill.metrics import Metric
from potstill.recipe.header import Header
from potstill.recipe.parse import parse_recipe
from potstill.recipe.spots import Loc, item_of, members, nested, settled
from potstill.rewards import Reward
from potstill.sources import Source
from potstill.stages import Stage

VALUES: list[Any] = [
    *(0, -1, 3, 10**40, 0.5, 1.5, -2.5, 1e300, math.nan, math.inf, -math.inf, True, False),
    *("", "x", "\0", "ü" * 50, "stage:", "stage:kd", "hf:", "path:/no/such", "auto", "5", "true", "{}"),
    *(datetime.date(1979, 5, 27), datetime.datetime(1979, 5, 27, 7, 32), datetime.time(7, 32)),
    *([], [[]], [{}], [1, "a"], ["a", "a"], [True], [datetime.date(1979, 5, 27)], [[1, [2]], 3], [1.5, 2, 3]),
    *({}, {"kind": []}, {"kind": "x"}, {"x": 1}, {"a": {"b": {"c": 1}}}, {"": 0}),
]


def subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for inner in cls.__subclasses__():
        yield inner
        yield from subclasses(inner)


CLASSES = {cls.__name__ for cls in subclasses(Settings) if cls.__module__.startswith("potstill.")}
WORDS = {"Source", "Shape", "Row", "Best", "Report", "Cache"}  # English as well
FOREIGN = re.compile(
    r"Input|should be|[Ll]iteral|function|plain|[Uu]nion|validat(or|ion error)|Value error|[Pp]ydantic|tuple|dict|NoneType|"
    r"datetime\.|<class|type=|\^|\{\d|\\A|_type\b|_parsing|ctx|"
    rf"\b({'|'.join(sorted(CLASSES - WORDS))}|ModelRef|StageRef|StudyRef|CacheRef)\b"
)


def table_for(role: str, cls: type[Component]) -> tuple[dict[str, Any], Loc]:
    """A recipe with a component in it, and where the component's table lies."""
    base = {"name": "base", "kind": "pretrain"}
    kd: dict[str, Any] = {"name": "kd", "kind": "distill", "student": "stage:base", "teacher": "stage:base"}
    study: dict[str, Any] = {"name": "study", "kind": "evaluate", "study": [{"name": "Base", "model": "stage:base"}]}
    recipe: dict[str, Any] = {"name": "t", "data": {"kind": "primer"}, "stage": [base]}
    table = {"kind": cls.kind}
    if role == "stage":
        recipe["stage"].append({"name": "it", "kind": cls.kind})
        return recipe, ("stage", 1)
    if role == "source":
        base["data"] = table  # type: ignore[assignment]
        return recipe, ("stage", 0, "data")
    if role in ("divergence", "init"):
        recipe["stage"].append({**kd, role: table})
        return recipe, ("stage", 1, role)
    if role == "metric":
        recipe["stage"].append({**study, "metrics": [table], "primary": str(cls.kind)})
        return recipe, ("stage", 1, "metrics", 0)
    recipe["stage"].append({"name": "out", "kind": "export", "model": "stage:base", "formats": [table]})
    return recipe, ("stage", 1, "formats", 0)


def places(cls: type[Settings]) -> Iterator[Loc]:
    """Every field below a table, and the fields of the tables in its lists."""
    for named in nested(cls, {}):
        yield named.path
    for name, field in cls.model_fields.items():
        item = item_of(members(field.annotation)[0], 0)
        if isinstance(item := settled(item, {}), type) and issubclass(item, Settings):
            yield (name, 0)
            yield from ((name, 0, inner) for inner in item.model_fields)


def put(table: dict[str, Any], loc: Loc, value: Any) -> None:
    inner: Any = table
    for part, after in itertools.pairwise(loc):
        if isinstance(inner, dict):
            inner = inner.setdefault(part, [] if isinstance(after, int) else {})
        else:
            inner += [{}] * (part + 1 - len(inner))
            inner = inner[part]
    if isinstance(inner, list):
        inner += [{}] * (loc[-1] + 1 - len(inner))  # type: ignore[operator]
    inner[loc[-1]] = copy.deepcopy(value)


def problems(table: dict[str, Any]) -> list[Any]:
    try:
        parse_recipe(table)
    except RecipeError as error:
        return error.problems
    return []


ROLES: dict[str, type[Component]] = {
    "stage": Stage,
    "source": Source,
    "divergence": Divergence,
    "init": Init,
    "metric": Metric,
    "reward": Reward,
    "exporter": Exporter,
}
COMPONENTS = [(role, kind) for role, of in ROLES.items() for kind in of.kinds]


@pytest.mark.parametrize("role, kind", COMPONENTS)
def test_a_wrong_value_of_any_field_is_told_in_our_words(role: str, kind: str):
    cls = ROLES[role].kinds[kind]
    good, at = table_for(role, cls)
    foreign = []
    for place in [*places(cls), ("kind",), ("nonsense",)]:
        for value in VALUES:
            table = copy.deepcopy(good)
            put(table, (*at, *place), value)
            for problem in problems(table):
                said = f"{problem.place}  {problem.rule.replace(str(Path.cwd()), '')}"
                if FOREIGN.search(said) or "datetime" in str(problem.value):
                    foreign.append((place, value, str(problem), problem.rule))
    assert foreign == []


def test_a_wrong_value_in_the_header_is_told_in_our_words():
    foreign = []
    for place in places(Header):
        for value in VALUES:
            table: dict[str, Any] = {"name": "t", "data": {"kind": "primer"}, "stage": [{"name": "base", "kind": "pretrain"}]}
            put(table, place, value)
            foreign += [(place, value, p) for p in problems(table) if FOREIGN.search(f"{p.place} {p.rule}")]
    assert foreign == []


def test_one_wrong_value_of_a_field_that_takes_this_or_that_is_one_problem():
    table, _ = table_for("exporter", Exporter.kinds["gguf"])
    for value, place, rule in (
        (5, "out.formats[0].types", "must be 'auto' or a list of f32, f16, bf16, q8_0, q4_0"),
        ("f16", "out.formats[0].types", "must be 'auto' or a list of f32, f16, bf16, q8_0, q4_0"),
        (["f61"], "out.formats[0].types[0]", "must be one of f32, f16, bf16, q8_0, q4_0; did you mean 'f16'?"),
    ):
        table["stage"][1]["formats"][0]["types"] = value
        assert [(problem.place, problem.rule) for problem in problems(table)] == [(place, rule)]


@pytest.mark.parametrize(
    "line, place",
    [
        ("ratio = true", "kd.ratio"),
        ("seed = false", "kd.seed"),
        ("top_k = true", "kd.top_k"),
        ("optim = { betas = [0.9, false] }", "kd.optim.betas"),
        ("optim = { steps = true }", "kd.optim.steps"),
        ('init = { kind = "layers", keep = [true] }', "kd.init.keep"),
    ],
)
def test_true_and_false_are_no_numbers(line: str, place: str):
    toml = BASE + '[[stage]]\nname = "kd"\nkind = "distill"\nstudent = "stage:base"\nteacher = "stage:base"\n' + line
    assert [(p.place, p.rule) for p in problems(tomllib.loads(toml))] == [(place, "must be a number, not true or false")]


# Names


HEAD = 'name = "t"\ndata = { kind = "primer" }\n'
BASE = HEAD + '[[stage]]\nname = "base"\nkind = "pretrain"\n'
SFT = BASE + '[[stage]]\nname = "sft"\nkind = "sft"\nmodel = "stage:base"\n'
KD = BASE + '[[stage]]\nname = "kd"\nkind = "distill"\nstudent = "stage:base"\nteacher = "stage:base"\n'
STUDY = BASE + '[[stage]]\nname = "study"\nkind = "evaluate"\nstudy = [{ name = "Base", model = "stage:base" }]\n'
ABOVE = "is a field of the recipe: write it above the first [[stage]]"

MEANT = {
    # where the field is in another table of the same stage
    "a table in the stage": (SFT, "lr = 1e-3", "did you mean 'optim.lr'?"),
    "misspelt, too": (SFT, "stepz = 3", "did you mean 'optim.steps'?"),
    "of the data": (SFT, "limit = 5", "did you mean 'data.limit'?"),
    "in two tables": (SFT, "max_new_tokens = 5", "did you mean 'validation.max_new_tokens'?"),
    "from a table to the stage": (KD, "optim = { ratio = 0.5 }", "did you mean 'kd.ratio'?"),
    "from a table to another": (STUDY, "prompts = { temperature = 0.5 }", "did you mean 'study.decoding.temperature'?"),
    "of another kind": (KD, "beta = 0.5", "did you mean 'divergence.beta', of divergence with kind = 'generalised_jsd'?"),
    "of this kind": (KD, 'beta = 0.5\ndivergence = "generalised_jsd"', "did you mean 'divergence.beta'?"),
    "under decoding": (STUDY, "temperature = 0.7", "did you mean 'decoding.temperature'?"),
    "in capitals": (SFT, "optim = { LR = 1e-3 }", "did you mean 'lr'?"),
    "with a hyphen": (SFT, "optim = { batch-size = 8 }", "did you mean 'batch_size'?"),
    # other programs' names
    "learning_rate": (SFT, "learning_rate = 1e-3", "did you mean 'optim.lr'?"),
    "learning_rate in optim": (SFT, "optim = { learning_rate = 1e-3 }", "did you mean 'lr'?"),
    "misspelt learning_rate": (SFT, "learnig_rate = 1e-3", "did you mean 'optim.lr'?"),
    "num_epochs": (SFT, "num_epochs = 3", "did you mean 'optim.epochs'?"),
    "num_train_epochs": (SFT, "num_train_epochs = 3", "did you mean 'optim.epochs'?"),
    "max_steps": (SFT, "max_steps = 3", "did you mean 'optim.steps'?"),
    "batch": (SFT, "batch = 3", "did you mean 'optim.batch_size'?"),
    "per device": (SFT, "per_device_train_batch_size = 3", "did you mean 'optim.batch_size'?"),
    "max_length": (SFT, "max_length = 512", "did you mean 'prompts.max_tokens'?"),
    "max_seq_len": (SFT, "prompts = { max_seq_len = 512 }", "did you mean 'max_tokens'?"),
    "max_seq_length": (SFT, "max_seq_length = 512", "did you mean 'prompts.max_tokens'?"),
    "max_grad_norm": (SFT, "max_grad_norm = 1.0", "did you mean 'optim.clip'?"),
    "warmup_ratio": (SFT, "warmup_ratio = 0.1", "did you mean 'optim.warmup'?"),
    "bf16": (SFT, "bf16 = true", "did you mean 'optim.precision'?"),
    "lora_r": (SFT, "lora_r = 8", "did you mean 'adapter.r'?"),
    "rank": (SFT, "adapter = { rank = 8 }", "did you mean 'r'?"),
    "model_name_or_path": (SFT, 'model_name_or_path = "x"', "did you mean 'model'?"),
    "teacher_model": (KD, 'teacher_model = "x"', "did you mean 'teacher'?"),
    "alpha": (KD, "alpha = 0.5", "did you mean 'ratio' or 'adapter.alpha'?"),
    "lmbda": (KD, "lmbda = 0.5", "did you mean 'ratio'?"),
    "do_sample": (STUDY, "do_sample = true", "did you mean 'decoding.method'?"),
    # the recipe's own fields, and the stages'
    "seeds below a stage": (SFT, "seeds = [1, 2]", f"'seeds' {ABOVE}"),
    "log below a stage": (SFT, 'log = ["tensorboard"]', f"'log' {ABOVE}"),
    "sweep below a stage": (SFT, 'sweep = { "sft.seed" = [1] }', f"'sweep' {ABOVE}"),
    "checkpoint below a stage": (SFT, "checkpoint = { every_minutes = 1 }", f"'checkpoint' {ABOVE}"),
    "save_steps": (SFT, "save_steps = 500", f"'checkpoint.every_steps' {ABOVE}"),
    "seedz below a stage": (SFT, "seedss = [1, 2]", f"did you mean 'seeds'? It {ABOVE}"),
}


@pytest.mark.parametrize("case", MEANT)
def test_a_half_remembered_name_finds_its_field(case: str):
    toml, line, hint = MEANT[case]
    found = problems(tomllib.loads(toml + line))
    assert [problem.rule for problem in found] == [f"no such field; {hint}"]


MEANT_ABOVE = {
    "lr": ("lr = 1e-3", "'optim.lr' belongs in a stage: write it below its [[stage]]"),
    "learning_rate": ("learning_rate = 1e-3", "'optim.lr' belongs in a stage: write it below its [[stage]]"),
    "teacher": ('teacher = "hf:a/b"', "'teacher' belongs in a stage: write it below its [[stage]]"),
    "optim": ("optim = { lr = 1e-3 }", "'optim' belongs in a stage: write it below its [[stage]]"),
    "temprature": ("temprature = 2.0", "did you mean 'temperature'? It belongs in a stage: write it below its [[stage]]"),
    "max_length": ("max_length = 512", "did you mean 'prompts.max_tokens'?"),
    "save_steps": ("save_steps = 5", "did you mean 'checkpoint.every_steps'?"),
    "seedz": ("sedes = [1]", "did you mean 'seeds'?"),
    "random_seed": ("random_seed = 1", "did you mean 'seeds' or 'data.seed'?"),
}


@pytest.mark.parametrize("case", MEANT_ABOVE)
def test_a_stage_s_field_in_the_header_is_told_where_it_belongs(case: str):
    line, hint = MEANT_ABOVE[case]
    assert [p.rule for p in problems(tomllib.loads(f"{line}\n{BASE}"))] == [f"no such field; {hint}"]


def test_stages_for_stage():
    table = tomllib.loads(BASE)
    table["stages"] = table.pop("stage")
    assert [(p.place, p.rule) for p in problems(table)] == [("stages", "no such field; did you mean [[stage]]?")]


def test_every_name_of_another_program_leads_to_a_field_that_is_there():
    from potstill.recipe.hints import ELSEWHERE

    known = {".".join(named.path[i:]) for named in nested(Header, {}) for i in range(len(named.path))}
    for role in ROLES.values():
        for cls in role.kinds.values():
            known |= {".".join(named.path[i:]) for named in nested(cls, {}) for i in range(len(named.path))}
    known |= {f"data.{name}" for name in Source.model_fields} | {"data.splits.test", "data.splits.validation", "kind"}
    assert set(ELSEWHERE) - known == set()


# References

REFERENCES = {
    "a model of the hub": ("Qwen/Qwen2.5-0.5B", "did you mean 'hf:Qwen/Qwen2.5-0.5B'?"),
    "its page": ("https://huggingface.co/Qwen/Qwen2.5-0.5B", "did you mean 'hf:Qwen/Qwen2.5-0.5B'?"),
    "a revision": ("Qwen/Qwen2.5-0.5B@main", "did you mean 'hf:Qwen/Qwen2.5-0.5B@main'?"),
    "a stage": ("base", "did you mean 'stage:base'?"),
    "a stage, misspelt": ("bsae", "did you mean 'stage:base'?"),
    "a misspelt scheme": ("stag:base", "did you mean 'stage:base'?"),
    "a folder": ("FOLDER", "did you mean 'path:FOLDER'?"),
    "a folder that is not there": ("./models/mine", "did you mean 'path:./models/mine'?"),
    "two words": ("hello world", None),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_a_reference_without_its_scheme(case: str, tmp_path: Path):
    written, hint = REFERENCES[case]
    toml = SFT.replace("stage:base", written.replace("FOLDER", str(tmp_path)))
    (problem,) = problems(tomllib.loads(toml))
    rule = "must begin with 'stage:…' or 'hf:…' or 'path:…'"
    assert problem.rule == (f"{rule}; {hint.replace('FOLDER', str(tmp_path))}" if hint else rule)


def test_what_takes_no_model_of_the_hub_suggests_none():
    (problem,) = problems(tomllib.loads(STUDY + '[[stage]]\nname = "r"\nkind = "report"\nstudy = "a/b"\n'))
    assert problem.rule == "must begin with 'stage:…' or 'path:…'"


# Files


def test_a_path_counts_from_the_current_folder_and_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    toml = BASE + 'data = { kind = "jsonl", path = "rows.jsonl" }'
    (problem,) = problems(tomllib.loads(toml))
    assert problem.rule == f"no such file (relative to the current directory {tmp_path})"
    (problem,) = problems(tomllib.loads(SFT.replace("stage:base", "path:models/mine")))
    assert problem.rule == f"no such folder (relative to the current directory {tmp_path})"


def test_rows_beside_the_recipe_are_pointed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "rows.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
    table = tomllib.loads(HEAD.replace('"primer"', '"jsonl", path = "rows.jsonl"') + '[[stage]]\nname = "a"\nkind = "pretrain"')
    with pytest.raises(RecipeError) as caught:
        parse_recipe(table, "work/mine.toml")
    told = f"did you mean 'work/rows.jsonl', beside the recipe? (relative to the current directory {tmp_path})"
    assert [(p.place, p.rule) for p in caught.value.problems] == [("data.path", f"no such file; {told}")]
