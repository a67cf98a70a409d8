"""The embedded questions: what is held out, that every style is right, that the sentences are sentences."""

import hashlib
import re
import runpy
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import cast

import pytest
from pydantic import ValidationError

from potstill.core.types import Example
from potstill.sources import Source, Splits
from potstill.sources.primer import _ANSWERS, _QUESTIONS, Primer, Relation, _facts_of_countries


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return list(Primer().rows())


def parts(rows: list[Example], split: str) -> list[Example]:
    return [row for row in rows if Primer().split_of(row) == split]


def relation(row: Example) -> Relation:
    return cast(Relation, row.tag.split("/")[0])


def test_sizes(rows: list[Example]) -> None:
    counts = Counter(map(Primer().split_of, rows))
    assert 1200 <= counts["train"] <= 3000
    assert 150 <= counts["test"] <= 600
    assert 100 <= counts["validation"] <= 200


def test_no_question_is_asked_twice(rows: list[Example]) -> None:
    assert len({row.instruction for row in rows}) == len(rows)


def test_rows_of_a_country_share_a_key(rows: list[Example]) -> None:
    codes = [row for row in rows if relation(row) == "code"]
    assert all(f"{row.key}." in row.references for row in codes)
    assert {row.key for row in codes} == {row.key for row in rows}
    for split in ("test", "validation"):
        assert {row.key for row in parts(rows, split)} <= {row.key for row in parts(rows, "train")}


def test_splits_are_by_phrasing(rows: list[Example]) -> None:
    for row in rows:
        questions = _QUESTIONS["es" if row.language == "es" else "en", relation(row)]
        number = questions.index(pattern(row.instruction, rows))
        assert Primer().split_of(row) == {4: "validation", 5: "test"}.get(number, "train")


def test_rows_and_splits_are_those_of_the_first_release() -> None:
    """Taken when the key still named the phrasing: to draw by country changed neither texts, order nor splits."""
    shown = repr([(Primer().split_of(row), row.instruction, row.response) for row in Primer().rows()])
    assert hashlib.sha256(shown.encode()).hexdigest().startswith("6f498f5790475e17")


@pytest.mark.parametrize(
    "source, wanted",
    [
        (Primer(), "68d080abb73c08ccc69dfa4414db629686f0b1842af07ac5318fbc6462b7e5a4"),
        (
            Primer(languages=("es",), seed=3, countries=40),
            "1ada3e577c37622e3dfba5f1a0683c0c32ba0d3a38095beb22dfa1ad5d35700e",
        ),
    ],
)
def test_rows_are_those_of_the_stored_facts_and_babel_is_never_asked(source: Primer, wanted: str) -> None:
    """Taken from the rows that Babel 2.18.0 gave: another Babel must not change a run."""
    rows = [
        (row.key, row.instruction, row.response, row.references, row.language, row.tag, source.split_of(row))
        for row in source.rows()
    ]
    assert hashlib.sha256(repr(rows).encode()).hexdigest() == wanted
    program = "import sys; from potstill.sources.primer import Primer; list(Primer().rows()); print('babel' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_stored_facts_are_what_the_script_writes() -> None:
    babel = pytest.importorskip("babel")
    if babel.__version__ != "2.18.0":
        pytest.skip(f"the facts were taken from Babel 2.18.0, not {babel.__version__}")
    script = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "primer_facts.py"))
    made = {
        country: {language: script["facts"](language, country) for language in ("en", "es")} for country in script["known"]()
    }
    assert made == _facts_of_countries()


def pattern(question: str, rows: list[Example]) -> str:
    (found,) = [
        asked
        for phrasings in _QUESTIONS.values()
        for asked in phrasings
        if re.fullmatch(
            re.escape(asked)
            .replace(r"de\ \{c\}", r"de(l\ |\ ).+")
            .replace(r"a\ \{c\}", r"a(l\ |\ ).+")
            .replace(r"\{c\}", ".+"),
            question,
        )
    ]
    return found


def test_phrasings_of_the_test_are_never_trained(rows: list[Example]) -> None:
    asked = {split: {pattern(row.instruction, rows) for row in parts(rows, split)} for split in ("train", "validation", "test")}
    assert not asked["train"] & asked["test"]
    assert not asked["train"] & asked["validation"]
    assert not asked["validation"] & asked["test"]
    assert list(map(len, asked.values())) == [32, 8, 8]


def test_a_fact_is_tested_once_and_known_from_training(rows: list[Example]) -> None:
    trained: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for row in parts(rows, "train"):
        trained[relation(row), row.key].add(row.language)
        assert row.tag.endswith("/seen")
    tested = [(relation(row), row.key) for row in parts(rows, "test")]
    assert sorted(tested) == sorted(trained)
    for row in parts(rows, "test") + parts(rows, "validation"):
        known = trained[relation(row), row.key]
        assert known == ({"en", "es"} if row.tag.endswith("/new phrasing") else {"en", "es"} - {row.language})
    assert 0.1 < sum(row.tag.endswith("/new language") for row in parts(rows, "test")) / len(tested) < 0.3


def test_known_facts(rows: list[Example]) -> None:
    answers = {f"{row.language}/{relation(row)}/{row.key}": set(row.references) for row in rows}
    assert {"It is the Mexican peso.", "Mexican peso."} < answers["en/currency/MX"]
    assert {"Se llama peso mexicano.", "Peso mexicano."} < answers["es/currency/MX"]
    assert "The currency of the United Kingdom is the British pound." in answers["en/currency/GB"]
    assert "La moneda del Reino Unido se llama libra esterlina." in answers["es/currency/GB"]
    assert "Es el japonés." in answers["es/language/JP"]
    assert "Guatemala is in the Americas." in answers["en/continent/GT"]
    assert "El código de El Salvador es SV." in answers["es/code/SV"]


def test_the_answer_is_in_one_of_four_styles_and_all_are_accepted(rows: list[Example]) -> None:
    assert all(len(row.references) == 4 and row.response == row.references[0] for row in rows)
    words = Counter(len(row.response.split()) for row in rows)
    assert max(words) <= 12
    bare = sum(row.response == min(row.references, key=len) for row in rows) / len(rows)
    assert 0.2 < bare < 0.3


def test_sentences_are_well_formed(rows: list[Example]) -> None:
    for row in rows:
        for text in (row.instruction, *row.references):
            assert text.lstrip("¿")[0].isupper(), text
            assert text[-1] in ".?", text
            assert not re.search(r"[{}]|  |\b(de|a) el |\bthe the\b", text), text
            assert text.count("¿") == (text.count("?") if row.language == "es" else 0), text


def test_every_relation_is_asked_and_answered_in_both_languages() -> None:
    assert _QUESTIONS.keys() == _ANSWERS.keys()
    assert {len(phrasings) for phrasings in _QUESTIONS.values()} == {6}
    assert {len(styles) for styles in _ANSWERS.values()} == {4}


def test_fewer_of_everything() -> None:
    source = Primer(languages=("es",), relations=("code",), countries=5, phrasings=3, answer_styles=1)
    rows = list(source.rows())
    assert Counter(map(source.split_of, rows))["train"] == 5
    assert Counter(map(source.split_of, rows))["test"] == 5
    assert all(re.fullmatch(r"[A-Z]{2}\.", row.response) and row.references == (row.response,) for row in rows)
    assert not any(row.tag.endswith("new language") for row in rows)


def test_rows_follow_the_seed_and_the_hash_follows_the_rows() -> None:
    hashes = {Primer(countries=5, seed=seed).content_hash() for seed in range(3)} | {Primer(countries=6).content_hash()}
    assert len(hashes) == 4


def test_splits_are_its_own() -> None:
    with pytest.raises(ValidationError, match="primer splits by phrasing; leave splits out"):
        Primer(splits=Splits(test=0.5))
    assert Source.parse(Primer().spec()) == Primer()


def test_each_language_once() -> None:
    with pytest.raises(ValidationError, match="names something twice: es, es"):
        Primer(languages=("es", "es"))
