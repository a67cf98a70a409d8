"""`potstill compare`: finished models on all rows of a file, and only what their scores allow to be said."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_parts import chat_tokenizer, rows, tiny_model
from tiny_run import call

from potstill.commands.compare import comparison
from potstill.core.errors import UserError
from potstill.core.types import Example
from potstill.data.prompts import Prompts, Renderer
from potstill.edges.models import load_model, load_tokenizer, save_model

SHORT = ("--max-new-tokens", "4", "--metrics", "nll,rouge_l", "--quiet")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows; models `a` and `b` of one tokenizer, `c` of another."""
    root = tmp_path_factory.mktemp("compared")
    text = "".join(json.dumps({"question": row["instruction"], "output": row["response"]}) + "\n" for row in rows(30))
    (root / "rows.jsonl").write_text(text, encoding="utf-8")
    for seed, (name, tokens) in enumerate({"a": 400, "b": 400, "c": 330}.items()):
        tokenizer = chat_tokenizer(tokens)
        save_model(tiny_model("qwen2", len(tokenizer), seed=seed), tokenizer, root / name)
    return root


def words(root: Path, *models: str, out: str = "run") -> list[str]:
    named = [f"{model.partition('=')[0]}=path:{root / model.partition('=')[2]}" for model in models]
    columns = ("--set", "data.instruction=question", "--set", "data.response=output")
    return ["compare", *named, "--data", str(root / "rows.jsonl"), *columns, "--out", str(root / out), *SHORT]


def study_of(root: Path, out: str) -> dict[str, Any]:
    (file,) = (root / out).glob("artifacts/study-*/study.json")
    return json.loads(file.read_text())


def test_two_models_are_compared_on_every_row_of_the_file(root: Path) -> None:
    result = call(*words(root, "mine=b", "base=a", out="two"), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["test_set"]["rows"], report["test_set"]["of_rows"], report["primary"]) == (30, 30, "nll")
    assert {row["name"]: row["role"] for row in report["rows"]} == {"mine": "candidate", "base": "base"}
    asked = {(v["metric"], v["key"], v["a"], v["b"]) for v in report["verdicts"]}
    assert asked == {(metric, "compared", "mine", "base") for metric in ("nll", "rouge_l")}
    assert report["headline"]["verdict"] in ("better", "worse", "not shown")
    page = (root / "two" / "report.html").read_text(encoding="utf-8")
    said = [report["headline"]["sentence"], report["ship"]["sentence"], *report["caveats"]]
    assert not any(word in " ".join(said) for word in ("istilling", "helped", "hurt", "student"))
    assert report["headline"]["sentence"] in page
    assert "give the recipe a stage" not in page, "nobody wrote a recipe"
    again = call(*words(root, "mine=b", "base=a", out="two"))
    assert again.exit_code == 0
    assert len(list((root / "two").glob("artifacts/study-*"))) == 1, "the same command finds its study"


def test_across_tokenizers_nll_is_per_byte_and_kl_abstains(root: Path) -> None:
    """Nats are those of each model over its own tokens, whatever it is compared with; what divides them is one number."""
    every = [*words(root, "base=a", "kin=b", "other=c", out="apart"), "--teacher", "kin"]
    every[every.index("nll,rouge_l")] = "nll,kl_to_teacher"
    result = call(*every, "--json")
    assert result.exit_code == 0, result.output
    report, study = json.loads(result.stdout), study_of(root, "apart")
    nll, _ = report["metrics"]
    assert (nll["unit"], nll["over"], nll["title"]) == ("nats/byte", "bytes", "NLL per byte")
    answers = [row["response"] for row in rows(30)]
    assert sorted(study["bytes"]) == sorted(len(answer.encode()) for answer in answers)
    for name in ("a", "c"):
        where = f"path:{root / name}"
        row = {"a": "base", "c": "other"}[name]
        nats = sum(_nats(where, example["instruction"], example["response"]) for example in rows(30))
        found = next(r for r in report["rows"] if r["name"] == row)["metrics"]["nll"]["value"]
        assert found == pytest.approx(nats / sum(len(answer.encode()) for answer in answers), rel=1e-4)
    scores = {row["name"]: set(row["scores"]) for row in study["rows"]}
    assert scores == {"base": {"nll", "kl_to_teacher"}, "kin": {"nll", "kl_to_teacher"}, "other": {"nll"}}
    assert {(v["a"], v["b"]) for v in report["verdicts"] if v["key"] == "compared" and v["metric"] == "nll"} == {
        ("other", "base"), ("kin", "base"), ("kin", "other"),
    }  # fmt: skip
    assert not [v for v in report["verdicts"] if v["metric"] == "kl_to_teacher"], "a teacher is no nearer to itself than others"
    caveats = " ".join(report["caveats"])
    assert "different tokenizers" in caveats
    assert "KL to teacher was not taken of other" in caveats


def _nats(where: str, instruction: str, response: str) -> float:
    """−log q of the answer with its end, from a plain forward pass over the model's own vocabulary."""
    import torch

    model, tokenizer = load_model(where), load_tokenizer(where)
    row = Renderer(tokenizer, Prompts()).row(Example("", instruction, response))
    with torch.no_grad():
        logits = model(torch.tensor([row.prompt + row.response])).logits[0, :, : max(tokenizer.get_vocab().values()) + 1]
    logq = logits.log_softmax(-1)[len(row.prompt) - 1 : -1]
    return -float(logq.gather(1, torch.tensor(row.response)[:, None]).sum())


def test_one_tokenizer_keeps_nats_per_token(root: Path) -> None:
    report = json.loads(call(*words(root, "base=a", "kin=b", out="kin"), "--json").stdout)
    assert report["metrics"][0] == {
        "name": "nll", "title": "NLL", "unit": "nats/token", "higher_is_better": False, "over": "tokens",
        "against_teacher": False,
    }  # fmt: skip


def test_a_gguf_file_of_a_model_has_its_scores(root: Path) -> None:
    from potstill.exporters.gguf import Gguf

    (root / "files").mkdir()
    (file,) = Gguf(types=("f32",)).write(
        load_model(f"path:{root / 'a'}"), load_tokenizer(f"path:{root / 'a'}"), {}, root / "files"
    )
    report = json.loads(call(*words(root, "folder=a", f"file={file}", out="gguf"), "--json").stdout)
    folder, found = report["rows"]
    assert found["metrics"] == folder["metrics"]
    assert found["bytes"] == file.stat().st_size
    assert [v["difference"] for v in report["verdicts"]] == [0.0, 0.0]
    assert "the scores are the same" in report["headline"]["sentence"]
    asked = call("compare", f"a=path:{root / 'files'}", f"b=path:{root / 'b'}", "--data", str(root / "rows.jsonl"))
    assert asked.exit_code == 2
    assert f"name the GGUF file itself: path:{file}" in asked.stderr


@pytest.mark.parametrize(
    ("models", "more", "told"),
    [
        (["a=path:x"], {}, "compare needs two models or more"),
        (["a=path:x", "a=path:y"], {}, "two models are called 'a'; names must differ"),
        (["a=path:x", "path:y"], {}, "path:y: write NAME=MODEL, such as"),
        (["a=path:x", "b="], {}, "b=: write NAME=MODEL, such as"),
        (["a=path:x", "b=org/y"], {}, "b=org/y: a model begins with hf: or path:"),
        (["a=path:x", "b=stage:y"], {}, "b=stage:y: a model begins with hf: or path:"),
        (["old=path:x", "new=path:y"], {"teacher": "nwe"}, "--teacher nwe: no model is called so; did you mean 'new'?"),
        (["a=path:x", "b=path:y"], {"data": "rows.xls"}, "no source reads files that end in '.xls'; known are .jsonl"),
        (["a=path:x", "b=path:y"], {"metrics": "decode_speed"}, "none of them can decide between models; add one of"),
        (["a=path:x", "b=path:y"], {"metrics": "nll,kl_to_teacher"}, "compares with a teacher; name one by --teacher"),
        (["a=path:x", "b=path:y"], {"metrics": "rouge"}, "--metrics = 'rouge'  no metric of kind 'rouge'; did"),
        (["a=path:no-such", "b=path:y"], {}, "a = 'path:no-such'  no such folder"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_the_words_of_the_command(models: list[str], more: dict[str, str], told: str, root: Path) -> None:
    with pytest.raises(UserError) as caught:
        comparison(models, more.pop("data", str(root / "rows.jsonl")), **more)
    assert told in str(caught.value)


def test_mistakes_beyond_the_words_are_told_at_their_model_and_end_with_2(root: Path, tmp_path: Path) -> None:
    bare = load_tokenizer(f"path:{root / 'b'}")
    bare.chat_template = None
    save_model(load_model(f"path:{root / 'b'}"), bare, tmp_path / "bare")
    result = call(*words(root, "base=a", f"raw={tmp_path / 'bare'}", out="bare"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("compare: 1 problem\n  raw = 'path:")
    assert "the tokenizer has no chat template" in result.stderr
    assert result.stderr.endswith("alpaca, alpaca_es (set by --set prompts.format=…)\n")
    column = call("compare", f"a=path:{root / 'a'}", f"b=path:{root / 'b'}", "--data", str(root / "rows.jsonl"), "--quiet")
    assert column.exit_code == 2
    assert "  --data  " in column.stderr
    assert "no column 'instruction' (columns: question, output)" in column.stderr
    assert column.stderr.endswith('set data.instruction = "question" and data.response = "output" (each by --set)\n')


@pytest.mark.parametrize(
    ("names", "teacher", "roles"),
    [
        ("x y", None, "base candidate"),
        ("x Base", None, "candidate base"),
        ("big x y", "big", "teacher base candidate"),
        ("base x", "base", "teacher base"),
    ],
)
def test_the_first_model_that_is_no_teacher_is_the_base_unless_one_is_called_so(
    names: str, teacher: str | None, roles: str, root: Path
) -> None:
    recipe = comparison([f"{name}=hf:org/{name}" for name in names.split()], str(root / "rows.jsonl"), teacher=teacher)
    assert [row["role"] for row in recipe.table["stage"][0]["study"]] == roles.split()
