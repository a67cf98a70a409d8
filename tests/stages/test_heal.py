"""Healing: the student learns, its weights stay on the grid, and what is saved is what was trained."""

import io
import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_parts import rows, save_pair, write_rows

from potstill.core.artifact import Artifact
from potstill.core.errors import Interrupted, RecipeError
from potstill.core.progress import Progress
from potstill.core.types import Example
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, TokenStore, instruction_pairs
from potstill.edges.codes import weight_of
from potstill.edges.models import linears_in, load_model, load_tokenizer
from potstill.losses.cross_entropy import CrossEntropy
from potstill.quant.grid import put_on_grid
from potstill.quant.packed import load_packed, packed_of
from potstill.quant.rounding import round_to_nearest
from potstill.recipe.parse import parse_recipe
from potstill.report.card import model_card
from potstill.report.table import print_table
from potstill.run.runner import run_recipe
from potstill.train.loop import Optim, fit
from potstill.train.work import Work

OPTIM = {"steps": 12, "batch_size": 8, "lr": 5e-3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heal")
    save_pair(folder, student=32, teacher=32)
    write_rows(folder / "rows.jsonl")
    return folder


def recipe(root: Path, *stages: dict[str, Any], **more: Any) -> Any:
    data = {"kind": "jsonl", "path": str(root / "rows.jsonl"), "language": "en", "splits": {"validation": 0.2, "test": 0.3}}
    prompts = {"max_tokens": 128, "max_prompt_tokens": 96}
    four = {"name": "four", "kind": "quantize", "model": f"path:{root}/student", "method": "rtn", "rows": 8, **more}
    return parse_recipe({"name": "heal", "data": data, "prompts": prompts, "stage": [four, *stages]})


def run(root: Path, *stages: dict[str, Any], **more: Any) -> dict[str, Artifact]:
    """All tests run in one folder, so that what several need is made once."""
    return run_recipe(recipe(root, *stages, **more), root / "run")


def heal(root: Path, **more: Any) -> dict[str, Any]:
    kl = {"times": 1, "rows": 12, "metrics": ["kl_to_teacher"]}
    taught = {"student": "stage:four", "teacher": f"path:{root}/student"}
    return {"name": "healed", "kind": "heal", **taught, "optim": OPTIM, "validation": kl, **more}


def divergences(made: Artifact) -> list[float]:
    lines = [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]
    return [line["validation_kl_to_teacher"] for line in lines if "validation_kl_to_teacher" in line]


@pytest.mark.parametrize("trains", ["scales", "codes", "both"])
def test_what_trains_moves_and_all_stays_exact(root: Path, trains: str) -> None:
    unmeasured = {"validation": {"times": 0}} if trains == "codes" else {}  # at this rate they do harm, and would not be kept
    made = run(root, heal(root, trains=trains, **unmeasured))
    before, after = (load_packed(made[name].folder / "packed.safetensors") for name in ("four", "healed"))
    assert before.keys() == after.keys()
    moved = {
        "scales": any(not torch.equal(before[name].scales_OG, after[name].scales_OG) for name in before),
        "codes": any(not torch.equal(before[name].codes_OI, after[name].codes_OI) for name in before),
    }
    assert moved == {"scales": trains != "codes", "codes": trains != "scales"}
    where = f"path:{made['healed'].folder}"
    assert packed_of(load_model(where), where).keys() == before.keys()  # codes and weights agree bit for bit
    for name, matrix in after.items():
        assert matrix.scales_OG.dtype == torch.float16
        assert -8 <= int(matrix.codes_OI.min()) <= int(matrix.codes_OI.max()) <= 7, name
    if trains == "scales":
        first, last = divergences(made["healed"])
        assert last < 0.9 * first  # on validation rows


def test_what_is_no_part_of_the_grid_stays_or_is_a_norm_or_bias(root: Path) -> None:
    made = run(root, heal(root))
    before, after = (load_file(made[name].folder / "model.safetensors") for name in ("four", "healed"))
    packed = load_packed(made["four"].folder / "packed.safetensors")
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed - {f"{name}.weight" for name in packed} == {name for name in before if before[name].ndim == 1}
    assert after["model.embed_tokens.weight"].dtype == before["model.embed_tokens.weight"].dtype


def test_embeddings_of_eight_bits_stay_as_they_are(root: Path) -> None:
    made = run(root, heal(root), embeddings="8bit")
    before, after = (load_packed(made[name].folder / "packed.safetensors")["model.embed_tokens"] for name in ("four", "healed"))
    assert after.bits == 8
    assert torch.equal(before.codes_OI, after.codes_OI)
    where = f"path:{made['healed'].folder}"
    assert "model.embed_tokens" in packed_of(load_model(where), where)


class Notes(Progress):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def studied(root: Path, *healed: str) -> list[dict[str, Any]]:
    """What measures models healed of `four`, and tells of them."""
    rows = [
        {"name": "Full", "role": "kd", "model": f"path:{root}/student"},
        {"name": "4-bit", "role": "quantized", "model": "stage:four"},
    ]
    rows += [{"name": name, "role": "quantized", "model": f"stage:{name}"} for name in healed]
    study = {"name": "study", "kind": "evaluate", "study": rows, "metrics": ["nll"], "primary": "nll"}
    return [study, {"name": "report", "kind": "report", "study": "stage:study"}]


def test_what_becomes_worse_is_not_kept_and_nobody_takes_it_for_healed(root: Path, tmp_path: Path) -> None:
    notes, said = Notes(), io.StringIO()
    harmful = heal(root, optim={**OPTIM, "lr": 0.5, "steps": 3})
    best = {"name": "picked", "kind": "best", "candidates": ["stage:healed"], "by": "validation_kl_to_teacher"}
    gptq = {"method": "gptq"}
    made = run_recipe(recipe(root, harmful, best, *studied(root, "healed", "picked"), **gptq), tmp_path, progress=notes)
    first, last = divergences(made["healed"])
    assert last > first
    for file in ("model.safetensors", "packed.safetensors"):
        before, after = (load_file(made[name].folder / file) for name in ("four", "healed"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), file
    four, healed = made["four"].summary, made["healed"].summary
    assert healed["healing"] == {"kl_before": first, "kl_after": last, "kept": False}
    assert [healed[name] for name in ("method", "layers")] == [four[name] for name in ("method", "layers")]
    assert "healed" not in healed
    assert any("healing made it worse" in line and "lower optim.lr" in line for line in notes.lines)
    assert any("healing was not kept: KL to the teacher" in line and "equals stage:four" in line for line in notes.lines)
    assert made["picked"].summary["best"]["candidates"][0]["mean"] == first  # by what it is, not by what was thrown away
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    for name in ("healed", "picked"):
        assert rows[name]["metrics"] == rows["4-bit"]["metrics"]
        assert (rows[name]["equals"], rows[name]["trained"], rows[name]["steps"]) == ("4-bit", [], None)
        (caveat,) = [one for one in report["caveats"] if one.startswith(f"{name}: healing was not kept")]
        assert f"{first:.3g} -> {last:.3g}" in caveat
        assert not [verdict for verdict in report["verdicts"] if "trained further" in " ".join(verdict["doubts"])]
        assert "(equals 4-bit)" in model_card(report, model_row=name)
    assert not {curve["name"] for curve in report["curves"]} & {"healed", "picked"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("<small>equals 4-bit</small>") == 2
    assert page.count("Reconstruction error of") == 1  # one picture of the same layers
    print_table(report, Console(file=said, width=100))
    assert said.getvalue().count("equals 4-bit") == 2


def test_what_healing_won_is_told(root: Path) -> None:
    wanted = recipe(root, heal(root), *studied(root, "healed"))
    made = run_recipe(wanted, root / "run")
    first, last = divergences(made["healed"])
    words = f"healed: KL to the teacher on validation rows {first:.3g} -> {last:.3g} nats/token, {1 - last / first:.0%} less"
    assert wanted.stages[1].closing(made["healed"].summary).endswith(words)
    report = json.loads((root / "run" / "report.json").read_text())
    assert {row["name"]: (row["healing"], row["equals"]) for row in report["rows"]}["healed"] == (words, None)
    assert words.replace(">", "&gt;") in (root / "run" / "report.html").read_text()


def test_a_cache_takes_the_place_of_the_live_teacher(root: Path) -> None:
    cache = {"name": "said", "kind": "cache", "teacher": f"path:{root}/student"}
    unmeasured = {name: value for name, value in heal(root, cache="stage:said").items() if name != "validation"}
    made = run(root, cache, unmeasured)["healed"]
    assert made.summary["signal"]["kept"] == "hidden"
    with pytest.raises(RecipeError, match="kl_to_teacher"):
        recipe(root, cache, heal(root, cache="stage:said"))


def test_the_record_says_what_it_came_from(root: Path) -> None:
    made = run(root, heal(root))["healed"]
    assert made.summary["made_from"] == f"path:{root}/student"
    assert made.summary["trained"]["start"] == "stage:four"
    assert made.summary["trained"]["steps"] == OPTIM["steps"]
    assert (made.summary["method"], made.summary["bits_per_weight"]) == ("rtn, healed", 4.5)


def test_stopped_and_run_again_it_ends_with_the_same_bits(root: Path, tmp_path: Path) -> None:
    """Interrupted at every third step, against straight through: codes, scales, norms and biases."""
    examples = [Example(str(i), row["instruction"], row["response"]) for i, row in enumerate(rows(30))]
    renderer = Renderer(load_tokenizer(f"path:{root}/student"), Prompts())
    store = TokenStore.write(tmp_path / "store", instruction_pairs(examples, renderer, Counts()), Counts(), "here")
    settings = Optim(steps=8, batch_size=4, lr=3e-2)

    def begun() -> tuple[Any, Any]:
        model = load_model(f"path:{root}/student")
        layers = {name: layer for name, layer in linears_in(model).items() if name != "lm_head"}
        packed = {name: round_to_nearest(weight_of(layer), 32) for name, layer in layers.items()}
        return model, put_on_grid(model, packed, "both")

    straight, off = begun()
    fit(straight, store, CrossEntropy(), settings, Work(tmp_path / "straight", "straight"), seed=1)
    expected = off()
    while True:
        model, off = begun()
        calls = count(1)
        work = Work(tmp_path / "broken", "broken", stop_requested=lambda calls=calls: next(calls) == 3)
        try:
            fit(model, store, CrossEntropy(), settings, work, seed=1)
            break
        except Interrupted:
            continue
    for name, matrix in off().items():
        assert torch.equal(matrix.codes_OI, expected[name].codes_OI)
        assert torch.equal(matrix.scales_OG, expected[name].scales_OG)
    for ours, theirs in zip(model.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_student_off_the_grid_is_refused_before_anything_runs(root: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"is not quantised; name a `quantize` stage"):
        run_recipe(recipe(root, heal(root, student=f"path:{root}/student")), tmp_path)
    assert not list(tmp_path.glob("artifacts/healed*"))


@pytest.mark.parametrize(
    "more",
    [{"init": {"kind": "layers", "keep": [0]}}, {"adapter": {"r": 2}}, {"save_dtype": "bf16"}],
    ids=str,
)
def test_what_would_leave_the_grid_is_refused(root: Path, more: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"off the grid|cannot hold quantised weights exactly"):
        recipe(root, heal(root, **more))
