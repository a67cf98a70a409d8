"""The report says of each exported file whether it was opened and answers as its model, and how fast a page is."""

import io
import re
from typing import Any

from fake_study import SCRIPT, fake_answers, fake_study
from rich.console import Console

from potstill.report.build import Made, build_report
from potstill.report.html import render_html
from potstill.report.table import print_table

GOOD = {
    "file": "model-q4_0.gguf", "runtime": "llama.cpp", "type": "q4_0", "passed": True, "why": "", "positions": 24, "kl": 3.2e-3,
    "kl_max": 0.03, "agreement": 0.958, "total": 1.0, "limit": 0.02, "own_kl": None, "texts": 88, "differ": [], "known": {},
    "weights": None,
}  # fmt: skip
WRONG = GOOD | {
    "file": "compressed-tensors/model.safetensors", "runtime": "transformers, compressed-tensors", "type": "int4", "kl": 1e-9,
    "passed": False, "why": f"1 of 272 weights are not the model's, the first is {SCRIPT}", "limit": 1e-4,
    "weights": {"count": 272, "differ": ["a"]},
}  # fmt: skip
GONE = {"file": "model-f16.gguf", "passed": False, "why": "is missing"}
LEFT = {"web/model.bin": "llama.cpp is not here; pip install 'potstill[device]'"}


def page_of(records: dict[str, Any], device: dict[str, Any] | None = None) -> tuple[dict[str, Any], str]:
    study = fake_study(12)
    report = build_report(study, fake_answers(study), Made(verified=records, device=device or {}), resamples=50)
    return report, render_html(report)


def cells(page: str, file: str) -> list[str]:
    """What stands in the line of a file, and in the one beneath it."""
    verified = page.partition("<h2>Verified</h2>")[2].partition("</table>")[0]
    _, _, after = verified.partition(f"<small>{file}</small>")
    line = re.split(r"<tr><th", after)[0]
    return [" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in re.split(r"</t[hd]>", line)]


def test_files_that_pass_fail_and_were_not_opened_are_told() -> None:
    study = fake_study(12)
    model = next(row for row in study.rows if row.role == "quantized")
    report, page = page_of(
        {model.model: {"files": [GOOD, WRONG, GONE], "not_verified": LEFT}, "stage:other": {"files": [GOOD]}}
    )
    assert [(line["name"], line["result"]) for line in report["verified"]] == [
        (model.name, "passes"),
        (model.name, "fails"),
        (model.name, "fails"),
        (model.name, "not opened"),
    ]
    assert cells(page, GOOD["file"])[1:8] == [
        "✓ passes", "llama.cpp q4_0", "3.2e-03", "0.02", "0.958", "88 of 88", "–"
    ]  # fmt: skip
    wrong = cells(page, WRONG["file"])
    assert wrong[1:8] == [
        "✗ fails", "transformers, compressed-tensors int4", "1.0e-09", "0.0001", "0.958", "88 of 88", "271 of 272"
    ]  # fmt: skip
    assert any("1 of 272 weights are not the model" in cell for cell in wrong)
    assert SCRIPT not in page
    assert cells(page, GONE["file"])[1:3] == ["✗ fails", "is missing"]
    assert cells(page, "web/model.bin")[1] == "≈ not opened"
    assert "pip install" in cells(page, "web/model.bin")[2]


def test_an_export_older_than_verification_is_not_opened_and_one_without_figures_has_no_table() -> None:
    model = fake_study(12).rows[0].model
    report, page = page_of({model: {}})
    assert [(line["result"], line["why"]) for line in report["verified"]] == [
        ("not opened", "the export is older than verification; export again")
    ]
    assert "not opened" in page
    assert "<h2>Verified</h2>" not in page_of({})[1]


PAGE = {"model": "", "export": "stage:web", "file": "web/", "type": "q4_0", "folder_bytes": 129_000_000}
SPEED = {
    "browser": "Chrome 150.0.1", "tokens": 64, "context": 41, "load_s": 6.1, "first_s": 10.1, "tokens_per_s": 2.9,
    "all_load_s": [6.0, 6.1, 6.4], "all_first_s": [9.9, 10.1, 10.4], "all_tokens_per_s": [2.5, 2.9, 3.0],
}  # fmt: skip


def test_a_page_has_a_line_with_its_speed_or_with_why_it_has_none() -> None:
    study = fake_study(12)
    model = next(row for row in study.rows if row.role == "quantized")
    machine = {"processor": "a processor", "cores": 2, "system": "Linux"}
    about = {"runtime": "", "machine": machine, "new_tokens": 64, "repeats": 3, "files": []}
    pages = [PAGE | SPEED | {"model": model.model}, PAGE | {"model": model.model, "why": f"no browser is here; {SCRIPT}"}]
    report, page = page_of({}, {**about, "pages": pages})
    shown = " ".join(re.sub(r"<[^>]+>", " ", page.partition("In a browser, one thread")[2]).split())
    assert "129 MB 6.1 s 6.0 to 6.4 41 10.10 s 9.90 to 10.40 2.9 2.5 to 3.0 Chrome 150.0.1" in shown
    assert "129 MB not measured: no browser is here" in shown
    assert SCRIPT not in page
    console = Console(width=100, record=True, file=io.StringIO())
    print_table(report, console)
    told = " ".join(console.export_text().split())
    assert "in a browser: 129 MB, 2.9 tokens/s, one thread of Chrome 150.0.1" in told
