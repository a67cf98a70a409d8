"""The report, its page, its card and its table: complete, escaped, silent on the network, the same every time."""

import html.parser
import io
import json
import re

import numpy as np
import pytest
from fake_study import SCRIPT, fake_answers, fake_curves, fake_data, fake_provenance, fake_quantization, fake_report, fake_study
from rich.console import Console

from potstill.core.errors import UserError
from potstill.core.numbers import count, decimals, duration, estimate, interval, number, size
from potstill.report import ModelRow, Study, build_report, load_answers, model_card, print_table, report_of, write_report
from potstill.report.build import Made, mark, plain, representative
from potstill.report.html import render_html
from potstill.report.ship import how_to_run, size_of
from potstill.study.analysis import breakdown


@pytest.fixture(scope="module")
def report():
    return fake_report()


@pytest.fixture(scope="module")
def page(report):
    return render_html(report)


class Page(html.parser.HTMLParser):
    """Every tag, attribute and id of a page, and whether its tags close in order."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr", "path", "line", "use", "rect", "circle"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_report_has_the_promised_shape(report):
    kd = next(row for row in report["rows"] if row["name"] == "KD")
    assert kd["role"] == "kd"
    assert kd["metrics"]["rouge_l"]["ci"][0] < kd["metrics"]["rouge_l"]["value"] < kd["metrics"]["rouge_l"]["ci"][1]
    assert (kd["response_tokens"], kd["steps"], kd["seeds"]) == (1_234_567, 940, [1, 2, 3])
    first = report["verdicts"][0]
    assert (first["question"], first["metric"]) == ("KD over SFT", "rouge_l")
    assert {"difference", "ci", "verdict", "sentence"} <= set(first)
    assert {"caveats", "provenance", "curves", "data", "quantization"} <= set(report)
    questions = {v["question"] for v in report["verdicts"]}
    assert questions == {
        "KD over SFT",
        "Teacher over SFT",
        "4 bits against full precision",
        "GPTQ against round-to-nearest",
        "SFT over base",
        "Share of the teacher kept",
    }
    shares = [v for v in report["verdicts"] if v["key"] == "retention"]
    assert all(v["difference"] is None and v["ratio"] > 0 for v in shares)
    assert report["headline"]["shown_as"] == report["verdicts"][0]["shown_as"] == "helped"
    assert report["test_set"]["left_out"] == {"prompt too long": 3}


def test_clusters_are_told_everywhere(report):
    assert report["bootstrap"]["clusters"] == report["test_set"]["clusters"] == report["test_set"]["rows"] == 120
    study = fake_study(60)
    shared = tuple(example.model_copy(update={"key": f"k{i % 20}"}) for i, example in enumerate(study.examples))
    study = study.model_copy(update={"examples": shared})
    grouped = build_report(study, fake_answers(study), resamples=50)
    assert grouped["bootstrap"]["clusters"] == grouped["test_set"]["clusters"] == grouped["verdicts"][0]["clusters"] == 20
    page = render_html(grouped)
    assert "60 test rows in 20 clusters" in page
    assert "bootstrap over clusters of test rows" in page
    assert "bootstrap over 20 clusters of 60 test rows" in model_card(grouped, model_row="KD")


def test_other_metrics_are_called_exploratory(page):
    assert "exploratory: not corrected for the number of metrics" in page


def test_files_are_stable_and_the_page_can_be_drawn_from_the_json(report, page, tmp_path):
    json_path, html_path = write_report(report, tmp_path / "a")
    again = write_report(fake_report(), tmp_path / "b")
    assert json_path.read_bytes() == again[0].read_bytes()
    assert html_path.read_bytes() == again[1].read_bytes()
    assert render_html(json.loads(json_path.read_text("utf-8"))) == page


def test_json_never_holds_nan(tmp_path):
    study = fake_study(12, seeds=(1,))
    curves = [{"name": "KD", "role": "kd", "seed": 1, "points": [{"epoch": np.float32(1), "loss": float("nan")}]}]
    report = build_report(study, [], Made(curves, provenance={"seconds": {"kd": float("inf")}}), resamples=50)
    path, _ = write_report(report, tmp_path)
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["curves"][0]["points"][0]["loss"] is None


def test_page_runs_no_script_and_loads_nothing(page):
    found = Page(page)
    assert found.open == []
    assert not {"script", "link", "iframe", "img", "object", "embed", "base", "form"} & set(found.tags)
    policy = dict(found.attributes)["content"] and [v for k, v in found.attributes if k == "content" and "default-src" in v]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    for name, value in found.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "action"):
            assert value.startswith("#")
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_hostile_text_is_shown_as_text(page):
    assert SCRIPT not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert SCRIPT in "".join(Page(page).text)
    assert "{{ 7 * 7 }}" in page


def test_hostile_names_everywhere_are_escaped():
    hostile = "</style></svg><script>alert(1)</script>$\\frac$\x00\ud800"
    study = fake_study(12, seeds=(1,))
    rows = [ModelRow(**{**row.model_dump(), "name": f"{hostile}{i}"}) for i, row in enumerate(study.rows)]
    metrics = [metric.model_copy(update={"title": hostile, "unit": hostile}) for metric in study.metrics]
    examples = [e.model_copy(update={"tag": f"{hostile}{i % 2}", "language": hostile}) for i, e in enumerate(study.examples)]
    study = Study(
        **{**dict(study), "rows": rows, "metrics": metrics, "examples": examples, "data": {hostile: {hostile: hostile}}}
    )
    data = [{"stage": hostile, "dropped": {hostile: 1}, "end_of_turn": hostile, "mask_preview": [[hostile, True]]}]
    layers = [{"stage": hostile, "layers": [{"name": hostile, "gptq_error": 0.1, "rtn_error": 0.2}], "bits_per_weight": 4}]
    about = {"command": hostile, "recipe": hostile, "versions": {hostile: hostile}, "seconds": {hostile: 1}, hostile: [hostile]}
    curves = [{"name": hostile, "role": hostile, "seed": 1, "points": [{"epoch": 1, "loss": 1.0}]}]
    report = build_report(study, fake_answers(study), Made(curves, data, layers, provenance=about), resamples=20)
    found = Page(render_html(report))
    assert "script" not in found.tags
    assert found.open == []
    card = model_card(report, model_row=f"{hostile}2", base_model=hostile)
    shown = card.partition("\n# ")[2].partition("## How to run")[0]
    assert "script" in shown
    assert "<" not in shown


def test_ids_are_unique(page):
    ids = [value for name, value in Page(page).attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_page_holds_each_part_in_order(page):
    heads = ["Distilling", "Before you believe it", "Results", "What they answer", "Learning", "Size against quality"]
    heads += ["Where it helps", "Quantisation", "Data and loss mask", "Provenance"]
    body = page[page.index("<body>") :]
    at = [re.search(rf"<h[123]>{head}", body).start() for head in heads]
    assert at == sorted(at)
    assert "✗" in page
    assert 'class="counts">&lt;|im_end|&gt;' in page
    assert "is among them" in page


def test_bare_report_still_renders():
    study = fake_study(8, seeds=(1,))
    bare = study.model_copy(update={"rows": (study.rows[0],), "data": {}})
    report = build_report(bare, [], resamples=20)
    assert "No two models were measured" in render_html(report)
    empty = build_report(study.model_copy(update={"rows": ()}), [], resamples=20)
    assert Page(render_html(empty)).open == []
    assert Page(render_html(build_report(fake_study(0), [], resamples=20))).open == []


def test_study_survives_its_file(tmp_path):
    study = fake_study(6)
    study.save(tmp_path)
    assert Study.load(tmp_path) == study
    lines = [json.dumps(line, ensure_ascii=False) for line in fake_answers(study)]
    (tmp_path / "answers.jsonl").write_bytes("\n".join(lines).encode("utf-8", "backslashreplace"))
    assert load_answers(tmp_path) == fake_answers(study)
    assert report_of(tmp_path)["rows"][0]["name"] == "Base"


def test_scores_that_are_not_numbers_become_abstentions():
    row = ModelRow(name="x", scores={"m": np.array([[1.0, np.nan, np.inf]])})
    assert row.scores["m"] == ((1.0, None, None),)


def test_mistakes_are_told(tmp_path):
    with pytest.raises(UserError, match="run the evaluate stage"):
        Study.load(tmp_path)
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(UserError, match="is not a study: metrics: Field required"):
        Study.load(tmp_path)
    (tmp_path / "answers.jsonl").write_text('{"key": "a"}\n{"ke')
    with pytest.raises(UserError, match=r"answers.jsonl:2 is not JSON"):
        load_answers(tmp_path)
    study = fake_study(6)
    answers = fake_answers(study)
    with pytest.raises(UserError, match="5 lines for 6 test rows"):
        build_report(study, answers[:5])
    with pytest.raises(UserError, match=r"'row-5' where study.json has 'row-0'"):
        build_report(study, answers[::-1])
    with pytest.raises(ValueError, match="not 1 seeds × 6 test rows"):
        Study(**{**dict(study), "rows": [ModelRow(name="x", scores={"rouge_l": [[1.0, 2.0]]})]})
    with pytest.raises(ValueError, match="two models are called 'Base'"):
        Study(**{**dict(study), "rows": (study.rows[0], study.rows[0])})


LONG = "a still boils the wash and keeps the heart of it apart from the heads and the tails"


@pytest.mark.parametrize(
    ("answer", "reference", "rouge_l", "exact_match", "expected"),
    [
        ("londres!", "Londres", 10.0, None, "right"),
        ("x", "London", 99.5, None, "wrong"),
        ("London is the capital of France.", "Paris is the capital of France.", 83.3, 0.0, "wrong"),
        ("Berlin", "Bern", 66.7, 0.0, "wrong"),
        ("I write C#.", "I write C++.", 100.0, 0.0, "wrong"),
        ("C#", "C++", 100.0, None, "wrong"),
        ("-3", "3", 100.0, None, "wrong"),
        ("The capital is Paris, of course.", "Paris", 30.0, 0.0, "partly"),
        ("Parisians", "Paris", 0.0, 0.0, "wrong"),
        ("首都是巴黎。", "巴黎", 0.0, 0.0, "partly"),
        ("首都是柏林。", "巴黎", 0.0, 0.0, "wrong"),
        (LONG.replace("heart", "tail"), LONG, 90.0, 0.0, "partly"),
        ("No.", LONG, 49.9, 0.0, "differs"),
        ("No.", LONG, None, None, "unscored"),
        ("", "Paris", 0.0, 0.0, "wrong"),
        ("", "", 0.0, 0.0, "differs"),
        ("return a - b", "return a + b", 100.0, 0.0, "wrong"),
        ("return a + b", "return a + b", 100.0, 100.0, "right"),
    ],
)
def test_marks_claim_no_more_than_the_wording(
    answer: str, reference: str, rouge_l: float | None, exact_match: float | None, expected: str
):
    assert mark(answer, [reference], rouge_l, exact_match) == expected


def test_marks_follow_the_rule_of_exact_match_where_it_was_not_measured():
    assert mark("Maße", ["Masse"], None) == "wrong"  # ß is not ss
    assert mark("ISIR", ["ısır"], None, language="tr") == "right"
    assert mark("«Madrid».", ["madrid"], None) == "right"


def test_a_card_names_no_language_that_nobody_knows(report):
    groups = [{"group": group, "rows": 1, "values": {}} for group in ("und", "", "es")]
    own = {**report, "breakdown": {**report["breakdown"], "language": groups}}
    assert 'language:\n- "es"\ntags:' in model_card(own, model_row="KD")
    assert 'language:\n- "en"\ntags:' in model_card(own, model_row="KD", languages=["und", "en"])
    own["breakdown"]["language"] = groups[:2]
    assert "language:" not in model_card(own, model_row="KD").partition("\n---\n")[0]


def test_every_figure_on_validation_rows_has_its_curve():
    study = fake_study(12)
    points = [
        {"epoch": e, "step": e, "loss": 1.0, "validation_exact_match": 9.0 + e, "validation_novel": 1.0} for e in range(3)
    ]
    curves = [{"name": "KD", "role": "kd", "seed": 1, "points": points}]
    page = render_html(build_report(study, fake_answers(study), Made(curves), resamples=50))
    for title in ("Training loss", "Exact match on the validation rows", "validation novel"):
        assert title in page


def test_files_that_are_not_the_advised_ones_are_told_too():
    study = fake_study(120, means={"KD": 60.0}).with_files(
        "SFT", "runs/x/export", {"model-f16.gguf": 2_000_000, "config.json": 9}
    )
    report = build_report(study, fake_answers(study), resamples=50)
    assert report["ship"]["name"] != "SFT"
    assert "Also exported, SFT: <code>runs/x/export/model-f16.gguf</code> (2.00 MB)." in render_html(report)
    told = io.StringIO()
    print_table(report, Console(width=100, file=told))
    assert "  SFT: runs/x/export/model-f16.gguf  2.00 MB" in told.getvalue()


@pytest.mark.parametrize("N", [0, 1, 11, 12, 13, 500])
def test_shown_rows_are_spread_evenly(N):
    rows = representative(N)
    assert len(rows) == len(set(rows)) == min(N, 12)
    assert all(0 <= n < N for n in rows)
    if N > 24:
        assert max(np.diff(rows)) - min(np.diff(rows)) <= 1


def printed(report, width: int, encoding: str = "utf-8") -> str:
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_table(report, Console(file=buffer, width=width, legacy_windows=False))
    buffer.seek(0)
    return buffer.read()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_table_fits_its_width_and_cuts_no_cell(report, width: int, encoding: str):
    text = printed(report, width, encoding)
    assert max(map(len, text.splitlines())) <= min(width, 100)
    table = text.partition("Distilling helped")[0]
    lines = table.splitlines()
    for row in report["rows"]:
        found = row["metrics"]["rouge_l"]
        assert any(line.startswith(row["name"]) and number(found["value"], 1) in line for line in lines), row["name"]
        assert interval(found["ci"], 1).replace("−", "-") in table.replace("−", "-")
    shown, _, left = table.partition("Not shown at this width: ")
    for metric in report["metrics"]:
        assert all(word in shown for word in metric["title"].split()) or metric["title"] in " ".join(left.split())
    assert "Rouge-L" in shown
    assert ("KL to teacher" in " ".join(left.split())) is (width < 100)


def test_table_survives_the_longest_name_and_the_narrowest_terminal(report):
    rows = [{**row, "name": "a_name_of_forty_letters_without_a_blank_x"} for row in report["rows"]]
    text = printed({**report, "rows": rows}, 60)
    assert max(map(len, text.splitlines())) <= 60
    assert "a_name_of_forty_lett" in text
    assert "22.5" in printed(report, 40)


def test_sizes_are_of_files_that_are_there(report):
    study = fake_study().with_files(
        "KD 4-bit", "out/x", {"model-q4_0.gguf": 70_100_000, "model.safetensors": 198_000_000, "c.json": 1}
    )
    shipped = build_report(study, fake_answers(study), resamples=50)
    rows = {row["name"]: row for row in shipped["rows"]}
    assert rows["KD 4-bit"]["size"] == {"bytes": 70_100_000, "of": "model-q4_0.gguf"}
    assert rows["KD"]["size"] == {"bytes": 988_000_000, "of": "not exported"}
    assert [file["name"] for file in rows["KD 4-bit"]["files"]] == ["model-q4_0.gguf", "model.safetensors"]
    page, table, card = render_html(shipped), printed(shipped, 100), model_card(shipped, model_row="KD 4-bit")
    for text in (page, table, card):
        assert "283 MB" not in text, "the packed size is the size of no file"
        assert "70.1 MB" in text
    assert shipped["ship"]["name"] == "KD 4-bit"
    assert "llama-cli -m out/x/model-q4_0.gguf -cnv" in page
    assert "out/x/model-q4_0.gguf  70.1 MB" in table
    assert "llama-cli -m model-q4_0.gguf -cnv" in card
    assert "not exported" in printed(report, 100)
    assert "knows no exported file" in render_html(report)


def test_shards_are_one_model_and_commands_are_quoted():
    shards = {f"model-0000{i}-of-00002.safetensors": 5_000_000_000 for i in (1, 2)}
    row = ModelRow(name="x", scores={}, files=shards)
    assert size_of(row).bytes == 10_000_000_000
    assert how_to_run("a folder/model.gguf") == "llama-cli -m 'a folder/model.gguf' -cnv"
    import shlex

    _, _, code = shlex.split(how_to_run('it\'s "here"/model.safetensors'))
    compile(code, "command", "exec")


def test_card(report):
    card = model_card(report, model_row="KD 4-bit", license="apache-2.0", base_model="Qwen/Qwen2.5-0.5B")
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert 'license: "apache-2.0"' in front
    assert '- "es"' in front
    assert 'type: "rouge_l"' in front
    assert "| **KD 4-bit** |" in body
    table = [line for line in body.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 8
    assert "Distilling helped" in body
    assert "AutoModelForCausalLM" in body
    compile(body.partition("```python\n")[2].partition("```")[0], "card", "exec")
    with pytest.raises(UserError, match="no model 'Nobody'"):
        model_card(report, model_row="Nobody")


def test_card_says_base_teacher_licence_settings_and_how_to_run(report):
    card = model_card(report, model_row="KD 4-bit", files={"model-q4_0.gguf": 70_100_000})
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert 'license: "other"\nlicense_name: "unknown"' in front
    assert "look up the licence of its base model, `stage:base`," in body
    assert "- base: `stage:base`\n- teacher: `stage:teacher`" in body
    assert "lr `1e-05`" in body
    assert "```sh\nllama-cli -m model-q4_0.gguf -cnv  # 70.1 MB\nllama-server -m model-q4_0.gguf --jinja" in body
    assert "lms import model-q4_0.gguf" in body
    assert "ollama" not in body, "no Modelfile beside it"
    beside = model_card(report, model_row="KD 4-bit", files={"model-q4_0.gguf": 70_100_000, "Modelfile": 100})
    assert "ollama create NAME -f Modelfile\nollama run NAME" in beside
    assert "AutoModelForCausalLM" not in body, "there is nothing that transformers could load"
    both = model_card(report, model_row="KD 4-bit", files={"model-q4_0.gguf": 1, "model.safetensors": 2})
    assert "AutoModelForCausalLM" in both
    rows = [
        {**row, "trained": [{**record, "start": "hf:Qwen/Qwen2.5-0.5B@main"} for record in row["trained"]]}
        for row in report["rows"]
    ]
    known = model_card({**report, "rows": rows}, model_row="KD", license="apache-2.0")
    assert 'base_model: "Qwen/Qwen2.5-0.5B"' in known
    assert "`apache-2.0`, that of the base model. The terms of its teacher, `stage:teacher`, may bind it too." in known


def test_card_tells_how_it_was_quantised(report):
    quantized = [{"stage": "kd 4-bit@1", "method": "gptq", "bits_per_weight": 4.5}]
    assert "- quantised: gptq, 4.50 bits per weight" in model_card({**report, "quantization": quantized}, model_row="KD 4-bit")


def test_amber_looks_amber_everywhere():
    study = fake_study(seeds=(1,), means={"KD": 55.0, "Teacher": 10.0})
    doubted = build_report(study, fake_answers(study), resamples=200)
    assert (doubted["headline"]["verdict"], doubted["headline"]["shown_as"]) == ("helped", "in doubt")
    page = render_html(doubted)
    assert '<span class="badge in-doubt"><span aria-hidden="true">?</span> helped, in doubt</span>' in page
    hero = page[page.index('class="hero"') : page.index("</section>")]
    assert "badge helped" not in hero
    assert ".badge.in-doubt" in page
    assert "? Distilling helped" in printed(doubted, 100)
    assert "teacher not ahead" in page


def test_card_escapes_markdown(report):
    rows = [{**row, "name": "a|b <i>_x_</i>\n# head"} if row["name"] == "KD" else row for row in report["rows"]]
    card = model_card({**report, "rows": rows}, model_row="Base")
    assert r"| a\|b &lt;i&gt;\_x\_&lt;/i&gt; \# head |" in card


def test_numbers():
    assert number(-0.04, 1) == "0.0"
    assert number(-1.25, 2, signed=True) == "−1.25"
    assert number(None, 1) == "–"
    assert interval((0.004, 2.5), 1) == "[0.004, 2.5]"
    assert interval((0.0, 2.5), 1) == "[0.0, 2.5]"
    assert decimals("%", (0.01, 0.07)) == 3
    assert estimate(0.04, (0.01, 0.07), "%", signed=True) == "+0.040 [+0.010, +0.070]"
    assert [count(x) for x in (0, 999, 999.6, 181_000, 1.54e9)] == ["0", "999", "1.00 k", "181 k", "1.54 B"]
    assert [size(x) for x in (12, 724_000, 999_999, 1.03e9)] == ["12 B", "724 kB", "1.00 MB", "1.03 GB"]
    assert [duration(x) for x in (1.26, 245, 7620, None)] == ["1.3 s", "4 min 05 s", "2 h 07 min", "–"]


def test_plain_knows_numpy_and_refuses_nothing():
    value = {1: np.float64("nan"), "a": (np.int64(3), {2, 1}), "b": np.arange(2), "c": fake_quantization}
    assert plain(value)["1"] is None
    assert plain(value)["a"] == [3, [1, 2]]
    assert plain(value)["b"] == [0, 1]


def test_parts_may_be_missing():
    study = fake_study(30, seeds=(1,))
    for curves, data, quantization, provenance in (
        (fake_curves((1,)), [], [], {}),
        ([], fake_data(), [], {}),
        ([{"name": "KD", "role": "kd", "seed": 1, "points": []}], [{"stage": "sft"}], [{"stage": "q", "layers": []}], {}),
        ([], [], fake_quantization(1), fake_provenance()),
    ):
        made = Made(curves, data, quantization, provenance=provenance)
        report = build_report(study, fake_answers(study), made, resamples=20)
        assert Page(render_html(report)).open == []


@pytest.mark.parametrize(
    "tags, groups",
    [
        (("seen/a", "seen/b", "new/a", "new/c"), {"seen": 2, "new": 2}),
        (("seen/a", "seen/b"), {"seen/a": 1, "seen/b": 1}),
        (("a", "b", "a"), {"a": 2, "b": 1}),
    ],
)
def test_a_breakdown_groups_families_of_a_kind(tags: tuple[str, ...], groups: dict[str, int]) -> None:
    study = fake_study(12)
    tagged = tuple(example.model_copy(update={"tag": tags[n % len(tags)]}) for n, example in enumerate(study.examples))
    found = breakdown(Study(**{**dict(study), "examples": tagged}), "tag")
    assert {group["group"]: group["rows"] * len(tags) // 12 for group in found} == groups
