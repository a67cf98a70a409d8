"""Each mistake in a recipe has one exact message: where, what stands there, the rule, and a suggestion."""

import copy
import math
import random
import tomllib
from pathlib import Path

import pytest

from potstill.core.errors import RecipeError, UserError
from potstill.recipe.parse import load_recipe, parse_recipe
from potstill.stages.distill import Distill
from potstill.stages.pretrain import Pretrain
from potstill.stages.sft import SFT

BASE = 'name = "t"\ndata = "primer"\n[[stage]]\nname = "base"\nkind = "pretrain"\n'
TUNED = BASE + '[[stage]]\nname = "sft"\nkind = "sft"\nmodel = "stage:base"\n'
DISTILLED = BASE + '[[stage]]\nname = "kd"\nkind = "distill"\nstudent = "stage:base"\nteacher = "stage:base"\n'
STUDIED = BASE + '[[stage]]\nname = "study"\nkind = "evaluate"\nstudy = [{ name = "Base", model = "stage:base" }]\n'
DIVERGENCES = "forward_kl, generalised_jsd, reverse_kl, skew_kl, skew_reverse_kl, total_variation, weighted_sum"
SOURCES = (
    "bugnet, codeforces_cots, csv, debugbench, dolly, gsm8k, hub, jsonl, mbpp, parquet, primer, programs, quixbugs, squad, "
    "stage, stdlib"
)
STAGES = "best, cache, cut, device, distill, evaluate, export, generate, grpo, heal, minillm, pretrain, quantize, report, sft"


def message(toml: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_recipe(tomllib.loads(toml), "recipes/t.toml", overrides)
    return str(caught.value)


def parsed(toml: str, *overrides: str):
    return parse_recipe(tomllib.loads(toml), "recipes/t.toml", overrides)


ONE_MISTAKE = {
    # unknown fields, at every depth
    "top level": ("sedes = [1]\n" + BASE, "sedes = [1]  no such field; did you mean 'seeds'?"),
    "nothing alike": (
        "zzz = 1\n" + BASE,
        "zzz = 1  no such field (known: checkpoint, data, description, log, name, prompts, seeds, sweep)",
    ),
    "in a stage": (TUNED + "optimm = 1", "sft.optimm = 1  no such field; did you mean 'optim'?"),
    "in settings": (TUNED + "optim = { lrr = 1 }", "sft.optim.lrr = 1  no such field; did you mean 'lr'?"),
    "in a header's settings": (
        "checkpoint = { every_minuts = 1 }\n" + BASE,
        "checkpoint.every_minuts = 1  no such field; did you mean 'every_minutes'?",
    ),
    "in a component": (
        DISTILLED + 'divergence = { kind = "generalised_jsd", bta = 0.5 }',
        "kd.divergence.bta = 0.5  no such field; did you mean 'beta'?",
    ),
    "in a component's settings": (
        BASE + 'data = { kind = "primer", splits = { tset = 0.1 } }',
        "base.data.splits.tset = 0.1  no such field; did you mean 'test'?",
    ),
    "in a list": (
        STUDIED.replace("model =", "modle ="),
        "study.study[0].model                 is needed\n"
        "  study.study[0].modle = 'stage:base'  no such field; did you mean 'model'?",
    ),
    # types
    "whole number": (TUNED + "optim = { steps = 1.5 }", "sft.optim.steps = 1.5  must be a whole number"),
    "whole number, text": (TUNED + 'optim = { steps = "ten" }', "sft.optim.steps = 'ten'  must be a whole number"),
    "number": (TUNED + 'optim = { lr = "fast" }', "sft.optim.lr = 'fast'  must be a number"),
    "finite": (TUNED + "optim = { lr = nan }", "sft.optim.lr = nan  must be a finite number"),
    "truth": (TUNED + 'per_seed = "maybe"', "sft.per_seed = 'maybe'  must be true or false"),
    "text": (TUNED + "prompts = { system = 4 }", "sft.prompts.system = 4  must be text in quotes"),
    "table": (TUNED + "validation = 4", "sft.validation = 4  must be a table"),
    "list": ("seeds = 3\n" + BASE, "seeds = 3  must be a list: [ … ]"),
    "too short": (TUNED + "optim = { betas = [0.9] }", "sft.optim.betas[1]  is needed"),
    "too long": (TUNED + "optim = { betas = [0.9, 0.9, 0.9] }", "sft.optim.betas = [0.9, 0.9, 0.9]  holds at most 2"),
    "choice": (
        TUNED + 'optim = { schedule = "cosin" }',
        "sft.optim.schedule = 'cosin'  must be one of cosine, constant; did you mean 'cosine'?",
    ),
    "pattern": (
        BASE + 'data = { kind = "jsonl", path = "pyproject.toml", language = "english" }',
        "base.data.language = 'english'  must be a two-letter language code such as en",
    ),
    "a delimiter": (
        BASE + 'data = { kind = "csv", path = "pyproject.toml", delimiter = "tab" }',
        "base.data.delimiter = 'tab'  must be one character, and not a quotation mark; a tab is \"\\t\"",
    ),
    "a slice of a split": (
        BASE + 'data = { kind = "hub", hub = "someone/rows", split = "train[:10%]" }',
        "base.data.split[0] = 'train[:10%]'  must be the name of a split, without a slice; for fewer rows set share or limit",
    ),
    "empty text": (BASE + 'data = { kind = "jsonl", path = "" }', "base.data.path = ''  must not be empty"),
    "long text": (
        STUDIED.replace('name = "Base"', f'name = "{"x" * 41}"'),
        f"study.study[0].name = '{'x' * 36}…  must be at most 40 characters",
    ),
    "component": (
        DISTILLED + "divergence = 4",
        f"kd.divergence = 4  must be a table with a kind, or the kind alone: one of {DIVERGENCES}",
    ),
    "reference": (
        TUNED.replace("stage:base", "base"),
        "sft.model = 'base'  must begin with 'stage:…' or 'hf:…' or 'path:…'; did you mean 'stage:base'?",
    ),
    # ranges
    "too small": (DISTILLED + "temperature = 0", "kd.temperature = 0  must be more than 0"),
    "too large": (DISTILLED + "ratio = 1.5", "kd.ratio = 1.5  must be at most 1"),
    "at least": (TUNED + "optim = { batch_size = 0 }", "sft.optim.batch_size = 0  must be at least 1"),
    "less than": (TUNED + "seed = 3000000000", "sft.seed = 3000000000  must be less than 2147483648"),
    # kinds, names, needed fields
    "unknown stage": (
        TUNED.replace('kind = "sft"', 'kind = "sfft"'),
        f"sft.kind = 'sfft'  no such stage; did you mean 'sft'? (known: {STAGES})",
    ),
    "stage that is no text": (
        'name = "t"\n[[stage]]\nname = "a"\nkind = ["sft"]',
        f"a.kind = ['sft']  no such stage; did you mean 'sft'? (known: {STAGES})",
    ),
    "no kind": ('name = "t"\n[[stage]]\nname = "a"', f"a.kind  is needed: one of {STAGES}"),
    "unknown divergence": (
        DISTILLED + 'divergence = "forward_lk"',
        f"kd.divergence = 'forward_lk'  no divergence of kind 'forward_lk'; did you mean 'forward_kl'? (known: {DIVERGENCES})",
    ),
    "divergence without kind": (
        DISTILLED + "divergence = { beta = 0.5 }",
        f"kd.divergence  needs a kind: one of {DIVERGENCES}",
    ),
    "divergence of odd kind": (
        DISTILLED + "divergence = { kind = [] }",
        f"kd.divergence  needs a kind in quotes: one of {DIVERGENCES}",
    ),
    "unknown init": (
        DISTILLED + 'init = { kind = "layer", keep = [0] }',
        "kd.init  no init of kind 'layer'; did you mean 'layers'? (known: layers, width)",
    ),
    "no layers named": (
        TUNED + 'init = { kind = "layers" }',
        "sft.init  needs keep = [layers] or count = how many, and not both",
    ),
    "rows for layers that are named": (
        TUNED + 'init = { kind = "layers", keep = [0], rows = 8 }',
        "sft.init  rows is for count, which chooses layers; leave it out, or give count in place of keep",
    ),
    "no layers": (TUNED + 'init = { kind = "layers", keep = [] }', "sft.init.keep = []  needs at least 1"),
    "layers out of order": (
        TUNED + 'init = { kind = "layers", keep = [2, 0] }',
        "sft.init.keep = [2, 0]  must be layers counted from 0, each after the one before it, such as [0, 2, 4]",
    ),
    "half a layer": (
        TUNED + 'init = { kind = "layers", keep = [0, 1.5] }',
        "sft.init.keep[1] = 1.5  must be a whole number",
    ),
    "a width of nothing": (
        TUNED + 'init = { kind = "width" }',
        "sft.init  needs hidden_size, intermediate_size or heads",
    ),
    "in an optional group": (
        TUNED + "adapter = { alpah = 4 }",
        "sft.adapter.alpah = 4  no such field; did you mean 'alpha'?",
    ),
    "an adapter's range": (DISTILLED + "adapter = { dropout = 1 }", "kd.adapter.dropout = 1  must be less than 1"),
    "an adapter for nothing": (TUNED + "adapter = { targets = [] }", "sft.adapter.targets = []  needs at least 1"),
    "an odd precision": (
        DISTILLED + 'teacher_precision = "int4"',
        "kd.teacher_precision = 'int4'  must be one of auto, fp32, bf16, int8; did you mean 'int8'?",
    ),
    "unknown source": (
        BASE.replace("primer", "prime"),
        f"data = 'prime'  no source of kind 'prime'; did you mean 'primer'? (known: {SOURCES})",
    ),
    "no recipe name": (
        BASE.replace('name = "t"\n', ""),
        "name  is needed: the run's folder is runs/NAME unless --out says otherwise",
    ),
    "bad recipe name": (
        BASE.replace('"t"', '"../t"'),
        "name = '../t'  must be letters, digits, '-' or '_', and begin with a letter",
    ),
    "no stage name": (BASE.replace('name = "base"\n', ""), "stage[0].name  is needed: later stages refer to it"),
    "empty stage name": (BASE.replace('"base"', '""'), "stage[0].name  is needed: later stages refer to it"),
    "reserved stage name": (
        BASE.replace('"base"', '"data"'),
        "stage[0].name = 'data'  must be letters, digits, '-' or '_', begin with a letter, and not be one of "
        "checkpoint, data, description, log, name, prompts, seeds, stage, sweep",
    ),
    "no model": (TUNED.replace('model = "stage:base"', ""), "sft.model  is needed: what is tuned"),
    "no data": (
        BASE.replace('data = "primer"', ""),
        "base.data  is needed: rows for this stage, here or once as the recipe's own `data`",
    ),
    "same name twice": (TUNED.replace('"sft"\nkind', '"base"\nkind'), "stage[1].name = 'base'  stage[0] already has this name"),
    "no stage": ('name = "t"', "stage  a recipe needs at least one [[stage]]"),
    "one pair of brackets": ('name = "t"\n[stage]\nname = "a"', "stage  write [[stage]], in two pairs of brackets"),
    "stage that is no table": ('name = "t"\nstage = [1]', "stage[0] = 1  must be a table: write [[stage]]"),
    # seeds
    "no seed": ("seeds = []\n" + BASE, "seeds = []  needs at least 1"),
    "seed twice": ("seeds = [1, 1]\n" + BASE, "seeds = [1, 1]  must be different whole numbers from 0 to 2147483647"),
    "negative seed": ("seeds = [-1]\n" + BASE, "seeds = [-1]  must be different whole numbers from 0 to 2147483647"),
    "giant seed": (
        "seeds = [4294967296]\n" + BASE,
        "seeds = [4294967296]  must be different whole numbers from 0 to 2147483647",
    ),
    "broken seed": ("seeds = [1.5]\n" + BASE, "seeds[0] = 1.5  must be a whole number"),
    "seeds for nothing": (
        "seeds = [1, 2]\n" + BASE,
        "seeds = [1, 2]  no stage has per_seed = true, so more than one seed changes nothing",
    ),
    # references
    "later stage": (
        'name = "t"\ndata = "primer"\n[[stage]]\nname = "sft"\nkind = "sft"\nmodel = "stage:base"\n'
        '[[stage]]\nname = "base"\nkind = "pretrain"',
        "sft.model = 'stage:base'  'base' comes later; move it before this stage",
    ),
    "itself": (
        TUNED.replace("stage:base", "stage:sft"),
        "sft.model = 'stage:sft'  refers to its own stage; a stage can only use earlier ones",
    ),
    "each other": (
        TUNED.replace("stage:base", "stage:b") + '[[stage]]\nname = "b"\nkind = "sft"\nmodel = "stage:sft"',
        "sft.model = 'stage:b'  'b' in turn needs 'sft'; stages cannot need each other",
    ),
    "nobody": (
        TUNED.replace("stage:base", "stage:bse"),
        "sft.model = 'stage:bse'  no earlier stage of that name; did you mean 'base'?",
    ),
    "a study for a model": (
        STUDIED + '[[stage]]\nname = "sft"\nkind = "sft"\nmodel = "stage:study"',
        "sft.model = 'stage:study'  'study' makes an evaluation, and this needs a model",
    ),
    "a model for a study": (
        BASE + '[[stage]]\nname = "report"\nkind = "report"\nstudy = "stage:base"',
        "report.study = 'stage:base'  'base' makes a model, and this needs an evaluation",
    ),
    # files
    "the home of nobody": (
        TUNED.replace("stage:base", "path:~nobody-at-all/model"),
        "sft.model = 'path:~nobody-at-all/model'  no such folder",
    ),
    "a name too long for any disk": (
        BASE + f'data = {{ kind = "jsonl", path = "{"x" * 300}.jsonl" }}',
        f"base.data.path = '{'x' * 300}.jsonl'  no such file (relative to the current directory {Path.cwd()})",
    ),
    # rules between fields
    "no room for answers": (
        TUNED + "prompts = { max_tokens = 64, max_prompt_tokens = 64 }",
        "sft.prompts  max_prompt_tokens = 64 leaves no room for a response in max_tokens = 64",
    ),
    "nothing to train on": (
        BASE + 'data = { kind = "primer", splits = { validation = 0.5, test = 0.5 } }',
        "base.data.splits  validation + test = 1 leaves no row to train on; where nothing is trained, "
        "set validation = 0 and test = 1",
    ),
    "unmeasured verdict": (
        STUDIED + 'primary = "bleu"',
        "study  primary = 'bleu' is none of the metrics (rouge_l, exact_match, nll, kl_to_teacher)",
    ),
}


@pytest.mark.parametrize("case", ONE_MISTAKE)
def test_one_mistake_one_message(case):
    toml, expected = ONE_MISTAKE[case]
    count = expected.count("\n") + 1
    assert message(toml) == f"t.toml: {count} problem{'s' if count > 1 else ''}\n  {expected}"


def test_all_mistakes_come_at_once_in_the_order_of_the_file_and_in_two_columns():
    toml = (
        "sedes = [1]\n" + TUNED + "optim = { lrr = 1, lr = 2.0 }\n"
        '[[stage]]\nname = "sft"\nkind = "sft"\nmodel = "stage:bse"\n[[stage]]\nkind = "pretrian"\n'
    )
    assert message(toml) == (
        "t.toml: 7 problems\n"
        "  sedes = [1]                   no such field; did you mean 'seeds'?\n"
        "  stage[1].optim.lrr = 1        no such field; did you mean 'lr'?\n"
        "  stage[1].optim.lr = 2.0       must be at most 1\n"
        "  stage[2].name = 'sft'         stage[1] already has this name\n"
        "  stage[2].model = 'stage:bse'  no earlier stage of that name; did you mean 'base'?\n"
        "  stage[3].name                 is needed: later stages refer to it\n"
        f"  stage[3].kind = 'pretrian'    no such stage; did you mean 'pretrain'? (known: {STAGES})"
    )


def test_a_mistake_in_the_shared_fields_is_told_once():
    toml = (
        'name = "t"\ndata = { kind = "primer", limt = 5 }\nprompts = { max_tokens = "many" }\n'
        '[[stage]]\nname = "a"\nkind = "pretrain"\n'
        '[[stage]]\nname = "b"\nkind = "pretrain"\ndata = { limit = 5 }\nprompts = { system = "Be brief." }\n'
    )
    assert message(toml) == (
        "t.toml: 2 problems\n"
        "  data.limt = 5                no such field; did you mean 'limit'?\n"
        "  prompts.max_tokens = 'many'  must be a whole number"
    )


def test_a_stage_with_data_of_its_own_is_told_its_own_mistake():
    toml = (
        'name = "t"\ndata = { kind = "primer", limt = 5 }\n'
        '[[stage]]\nname = "a"\nkind = "pretrain"\ndata = { kind = "primer", limt = 6 }\n'
    )
    assert message(toml) == (
        "t.toml: 2 problems\n"
        "  data.limt = 5    no such field; did you mean 'limit'?\n"
        "  a.data.limt = 6  no such field; did you mean 'limit'?"
    )


def test_a_name_that_is_no_text_breaks_no_suggestion():
    assert message(TUNED.replace('name = "base"', "name = 5")) == (
        "t.toml: 2 problems\n"
        "  stage[0].name = 5         must be text in quotes\n"
        "  sft.model = 'stage:base'  no earlier stage of that name"
    )


JUNK = [
    0,
    -1,
    1.5,
    math.nan,
    math.inf,
    True,
    "",
    "x",
    "\0",
    "stage:kd",
    "hf:",
    "path:",
    [],
    [[]],
    {},
    {"kind": []},
    [1, "a"],
    10**40,
]


def places(value, place=()):
    """Every place inside a table, as the keys that lead there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*place, key)
        yield from places(inner, (*place, key))


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_is_told_in_our_words(seed):
    chance = random.Random(seed)
    good = tomllib.loads((Path(__file__).parents[2] / "recipes" / "quickstart.toml").read_text(encoding="utf-8"))
    told = []
    for _ in range(250):
        table = copy.deepcopy(good)
        for _ in range(chance.choice((1, 1, 2, 3))):
            *way, last = chance.choice(list(places(table)))
            inner = table
            for key in way:
                inner = inner[key]
            inner[last] = copy.deepcopy(chance.choice(JUNK))
        try:
            parse_recipe(table)
        except RecipeError as error:
            told.append(str(error))
    assert len(told) > 200
    assert [text for text in told if any(word in text for word in ("Input should", "Value error", "validator", "{{"))] == []


# Files that are not there


def test_no_such_data_file(rows_file):
    wrong = rows_file.with_name("row.jsonl")
    shared = f'name = "t"\ndata = {{ kind = "jsonl", path = "{wrong}" }}\n[[stage]]\nname = "a"\nkind = "pretrain"\n'
    again = '[[stage]]\nname = "b"\nkind = "pretrain"\n'
    told = "no such file; did you mean 'rows.jsonl'?"
    assert message(shared + again) == f"t.toml: 1 problem\n  data.path = '{wrong}'  {told}"
    own = BASE + f'data = {{ kind = "jsonl", path = "{wrong}" }}'
    assert message(own) == f"t.toml: 1 problem\n  base.data.path = '{wrong}'  {told}"


def test_no_such_model_folder(tmp_path):
    (tmp_path / "teacher").mkdir()
    toml = TUNED.replace("stage:base", f"path:{tmp_path}/techer")
    place = f"sft.model = 'path:{tmp_path}/techer'"
    assert message(toml) == f"t.toml: 1 problem\n  {place}  no such folder; did you mean 'teacher'?"


def test_no_such_recipe(tmp_path):
    (tmp_path / "mine.toml").write_text(BASE)
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "mien.toml")
    assert str(caught.value) == f"{tmp_path}/mien.toml: no such file; did you mean 'mine.toml'?"


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path)
    assert str(caught.value) == f"{tmp_path}: is a folder; name a recipe file in it"


def test_a_path_below_a_file_is_no_recipe(rows_file):
    with pytest.raises(UserError) as caught:
        load_recipe(rows_file / "mine.toml")
    assert str(caught.value) == f"{rows_file}/mine.toml: cannot be read (Not a directory)"


def test_not_toml(tmp_path):
    path = tmp_path / "t.toml"
    path.write_text('name = "t"\ndata = primer\n')
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}: not TOML: Invalid value (at line 2, column 8)"


def test_not_utf8(tmp_path):
    path = tmp_path / "t.toml"
    path.write_bytes('description = "Español"\n'.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}: not UTF-8 text (byte 19); save the file as UTF-8"


def test_a_byte_order_mark_is_passed_over(tmp_path):
    path = tmp_path / "t.toml"
    path.write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert load_recipe(path).name == "t"


def test_recipe_error_keeps_its_problems_for_programs():
    with pytest.raises(RecipeError) as caught:
        parsed(TUNED + "optim = { lrr = 1 }")
    problem = caught.value.problems[0]
    assert (problem.place, problem.value, problem.rule) == ("sft.optim.lrr", "1", "no such field; did you mean 'lr'?")


# Overrides

BAD_OVERRIDES = {
    "sft.optim.lr": "write stage.field=value, or field=value for the recipe's own fields",
    "=1": "write stage.field=value, or field=value for the recipe's own fields",
    "sft..lr=1": "write stage.field=value, or field=value for the recipe's own fields",
    "sft=1": "name a field of the stage too, such as sft.seed=1",
    "sff.seed=1": "'sff' is neither a stage nor a field of the recipe; did you mean 'sft'?",
    "sedes=[1]": "'sedes' is neither a stage nor a field of the recipe; did you mean 'seeds'?",
    "seeds.first=1": "'seeds' is not a table",
    "hf:o/none=path:m": "the recipe names no model 'hf:o/none'; write it as the recipe does",
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_bad_overrides(override):
    assert message("seeds = [1]\n" + TUNED, override) == f"--set {override}: {BAD_OVERRIDES[override]}"


def test_an_override_of_a_recipe_without_stages():
    assert (
        message('name = "t"\nstage = 5', "seeds=[1]") == "t.toml: 1 problem\n  stage  write [[stage]], in two pairs of brackets"
    )


def test_a_model_is_replaced_wherever_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "copy").mkdir()
    sft = TUNED.replace('model = "stage:base"', 'model = "hf:o/base"')
    rows = ("hf:o/base", "stage:sft", "hf:o/base2")
    study = ", ".join(f'{{ name = "{model}", model = "{model}" }}' for model in rows)
    study = f'[[stage]]\nname = "study"\nkind = "evaluate"\nstudy = [{study}]\n'
    *_, tuned, scored = parsed(sft + study, "hf:o/base=path:copy").stages
    assert tuned.model == "path:copy"
    assert [row.model for row in scored.study] == ["path:copy", "stage:sft", "hf:o/base2"]


def test_an_override_is_checked_like_the_file():
    assert message(TUNED, "sft.optim.lrr=1") == ("t.toml: 1 problem\n  sft.optim.lrr = 1  no such field; did you mean 'lr'?")


def stage_of(kind, toml: str, *overrides: str):
    stage = parsed(toml, *overrides).stages[-1]
    assert isinstance(stage, kind)
    return stage


def test_overrides_set_nested_fields():
    assert stage_of(SFT, TUNED, "sft.optim.lr=0.5").optim.lr == 0.5


def test_overrides_keep_the_rest_of_a_table():
    optim = stage_of(SFT, TUNED + "optim = { lr = 0.25, epochs = 2 }", "sft.optim.epochs=3").optim
    assert (optim.lr, optim.epochs) == (0.25, 3)


def test_overrides_take_text_without_quotes():
    assert stage_of(SFT, TUNED, "sft.prompts.system=Be brief, please.").prompts.system == "Be brief, please."
    assert stage_of(SFT, TUNED, "sft.model=hf:Qwen/Qwen2-0.5B").model == "hf:Qwen/Qwen2-0.5B"


def test_overrides_set_lists_and_whole_tables():
    found = parsed(TUNED, "sft.per_seed=true", "seeds=[4, 5]", "sft.optim={ lr = 0.5, betas = [0.8, 0.9] }")
    assert found.header.seeds == (4, 5)
    assert isinstance(found.stages[1], SFT)
    assert found.stages[1].optim.betas == (0.8, 0.9)


def test_overrides_reach_into_a_component_that_is_a_bare_kind():
    stage = stage_of(Distill, DISTILLED + 'divergence = "generalised_jsd"', "kd.divergence.beta=0.25")
    assert stage.divergence.spec() == {"kind": "generalised_jsd", "beta": 0.25}
    assert stage_of(Pretrain, BASE, "data.limit=7").data.limit == 7
    assert stage_of(Pretrain, BASE, "base.data.limit=7").data.limit == 7


def test_a_later_override_wins():
    assert stage_of(SFT, TUNED, "sft.seed=1", "sft.seed=2").seed == 2


def test_overrides_leave_the_given_table_alone():
    table = tomllib.loads(TUNED)
    parse_recipe(table, overrides=("sft.seed=9",))
    assert table == tomllib.loads(TUNED)


# What stages share


def test_a_stage_adds_to_the_shared_tables():
    toml = (
        'name = "t"\ndata = { kind = "primer", limit = 50, seed = 3 }\nprompts = { max_tokens = 99, max_prompt_tokens = 9 }\n'
        '[[stage]]\nname = "a"\nkind = "pretrain"\ndata = { limit = 5 }\nprompts = { system = "Be brief." }\n'
    )
    stage = stage_of(Pretrain, toml)
    assert stage.data.spec() | {"limit": 5, "seed": 3} == stage.data.spec()
    assert (stage.prompts.max_tokens, stage.prompts.max_prompt_tokens, stage.prompts.system) == (99, 9, "Be brief.")


def test_a_stage_adds_to_a_shared_bare_kind():
    assert stage_of(Pretrain, BASE + "data = { limit = 5 }").data.spec()["limit"] == 5


def test_another_kind_of_data_replaces_the_shared_one():
    stage = stage_of(Pretrain, BASE + 'data = { kind = "stdlib" }')
    assert stage.data.kind == "stdlib"
    assert stage.data.limit is None


def test_problems_point_at_files_relative_to_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
    assert parsed(BASE + 'data = { kind = "jsonl", path = "rows.jsonl" }').name == "t"
