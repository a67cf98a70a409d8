"""Scores of text in any script: identical is 100, different is not, and what cannot be scored is abstained from."""

import itertools
import random
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from potstill.core.types import Abstain, Example
from potstill.metrics import TextMetric
from potstill.metrics.exact_match import ExactMatch
from potstill.metrics.python_parses import PythonParses
from potstill.metrics.rouge_l import RougeL
from potstill.scorers.rouge import words
from potstill.scorers.text import exact_form, key_form, same_code, whitespace_form

COMPARING: dict[str, Any] = {
    "rouge_l": RougeL(),
    "exact_match": ExactMatch(),
    "exact_match, case counts": ExactMatch(fold_case=False),
    "exact_match, code": ExactMatch(normalisation="whitespace"),
}

SENTENCES = (
    "巴黎是法国的首都。",
    "東京は日本の首都です。",
    "カーテンを開けてください",
    "서울은 한국의 수도입니다.",
    "กรุงเทพเป็นเมืองหลวงของประเทศไทย",
    "ວຽງຈັນ",
    "ភ្នំពេញ",
    "နေပြည်တော်။",
    "བོད་ཡིག",
    "Москва",
    "القاهرة",
    "\u200fالقاهرة\u200f",
    "می‌خواهم",
    "Αθήνα και ΟΔΟΣ",
    "ירושלים",
    "दिन",
    "ক্ষুধা",
    "தமிழ்",
    "አዲስ አበባ",
    "ISTANBUL ısırgan İstanbul",
    "Straße, Maße",
    "Hà Nội là thủ đô của Việt Nam",
    "l'été à Nîmes",
    "x² + y²",
    "٣٫١٤",
    "iPhone手机很好 100%",
    "3️⃣ goals",
)


def example(*references: str, language: str = "") -> Example:
    return Example("k", "q", references[0], references=references, language=language)


@pytest.mark.parametrize("name", COMPARING)
@pytest.mark.parametrize("language", ["", "en", "es", "zh", "tr"])
@pytest.mark.parametrize("sentence", SENTENCES)
def test_identical_text_is_right_in_every_script_and_form(name: str, language: str, sentence: str) -> None:
    for form in ("NFC", "NFD"):
        assert COMPARING[name](unicodedata.normalize(form, sentence), example(sentence, language=language)) == 100


DIFFERENT = (
    ("दिन", "दीन"),  # day, poor
    ("कि", "की"),
    ("巴黎", "柏林"),
    ("巴黎是法国的首都", "巴黎是法国首都"),
    ("x²", "x2"),
    ("３", "3"),
    ("٣", "3"),
    ("Maße", "Masse"),
    ("ısı", "isi"),
    ("ﬁn", "fin"),
    ("ano", "año"),
    ("má", "ma"),
    ("ก็", "ก"),
    ("שָׁלוֹם", "שלום"),
    ("می‌خواهم", "میخواهم"),
)


@pytest.mark.parametrize("name", COMPARING)
@pytest.mark.parametrize("language", ["", "en", "hi"])
@pytest.mark.parametrize("a, b", DIFFERENT)
def test_different_words_are_not_right(name: str, language: str, a: str, b: str) -> None:
    assert COMPARING[name](a, example(b, language=language)) != 100
    assert COMPARING[name](b, example(a, language=language)) != 100


@pytest.mark.parametrize(
    "a, b",
    [
        *DIFFERENT,
        ("👎", "👍"),
        ("", "👍"),
        ("", "..."),
        ("?", "!"),
        ("3", "-3"),
        ("C#", "C++"),
        ("A-", "A+"),
        ("<", ">"),
        ("a - b", "a + b"),
        ("3.14", "3 14"),
        ("1,000", "1000"),
        ("New York", "NewYork"),
        ("5'", '5"'),
        ("$5", "5"),
        ("50%", "50"),
        (".5", "5"),
        ("don't", "dont"),
        ("¿", ""),
        ('""', ""),
        ("the dogs'", "the dogs"),
        ("[1]", "1"),
        ("a\tb", "a b"),
        ("5!", "5"),
        ("5！", "5"),
        ("5!.", "5."),
    ],
)
@pytest.mark.parametrize("fold_case", [True, False])
def test_what_exact_match_tells_apart(a: str, b: str, fold_case: bool) -> None:
    metric = ExactMatch(fold_case=fold_case)
    assert metric(a, example(b)) == metric(b, example(a)) == 0


@pytest.mark.parametrize(
    "a, b",
    [
        ("Paris", " Paris.\n"),
        ("Paris", '"Paris."'),
        ("Paris", "“Paris”."),
        ("Paris", "«Paris»"),
        ("Paris", "„Paris“"),
        ("巴黎", "「巴黎」"),
        ("¿Qué?", "Qué"),
        ("¡Sí!", "Sí"),
        ("\ufeffParis\u200f", "Paris"),
        ("'don't'", "don't"),
        ("e\u0301", "é"),
        ("42", "42;"),
        ("3.", "3"),
        ("巴黎。", "巴黎"),
        ("巴黎！", "巴黎"),
        ("हाँ।", "हाँ"),
        ("نعم؟", "نعم"),
        ("ہاں۔", "ہاں"),
        ("နေပြည်တော်။", "နေပြည်တော်"),
        ("አዎ።", "አዎ"),
        ("Paris…", "Paris"),
        ("Paris‼", "Paris"),
        ("don’t", "don't"),
        ("l’été “chaud” à Nîmes", 'l\'été "chaud" à Nîmes'),
    ],
)
@pytest.mark.parametrize("fold_case", [True, False])
def test_what_exact_match_overlooks(a: str, b: str, fold_case: bool) -> None:
    metric = ExactMatch(fold_case=fold_case)
    assert metric(a, example(b)) == metric(b, example(a)) == 100


@pytest.mark.parametrize(
    "a, b", [("ΟΔΟΣ", "οδος"), ("ΟΔΟΣ", "οδοσ"), ("ÉTÉ", "été"), ("МОСКВА", "москва"), ("STRAẞE", "straße")]
)
def test_case_is_a_field(a: str, b: str) -> None:
    assert ExactMatch()(a, example(b)) == 100
    assert ExactMatch(fold_case=False)(a, example(b)) == 0


def test_turkish_i_has_its_own_capital() -> None:
    assert exact_form("ISIR İNAT", language="tr") == exact_form("ısır inat", language="tr")
    assert exact_form("ISIR", language="tr") != exact_form("isir", language="tr")


@pytest.mark.parametrize(
    "answer, reference, f1",
    [
        ("巴黎是法国的首都", "巴黎是法国首都", 2 * 7 / (8 + 7)),  # one character of eight too many
        ("iPhone手机", "iPhone电话", 2 * 1 / (3 + 3)),
        ("서울은 수도", "서울은 한국의 수도", 2 * 2 / (2 + 3)),  # Korean parts words by blanks
        ("สวัส", "สวัสดี", 2 * 3 / (3 + 4)),  # a letter with its vowel sign is one
        ("東京は", "東京", 2 * 2 / (3 + 2)),
    ],
)
def test_rouge_l_by_script_by_hand(answer: str, reference: str, f1: float) -> None:
    assert RougeL()(answer, example(reference)) == pytest.approx(100 * f1)


PIECES = [
    *("running", "runs", "ran", "the", "THE", "cats'", "don't", "it's", "well-known", "snake_case", "__init__", "generally"),
    *("3.14", "-3", "1,000", "C++", "C#", "a/b", "e.g.", "U.S.A.", "x=1;", '"quoted"', "(brackets)", "#tag", "@name", "100%"),
    *("police", "killed", "killing", "universities", "ponies", "caresses", "$5", "...", "!?", "—", "–", "’", "“", "”", "\t"),
]


@pytest.mark.parametrize("language", ["en", "en-US", "EN", "eng", "en_GB"])
def test_english_is_stemmed_by_whatever_code_it_is_named(language: str) -> None:
    assert RougeL()("police kill", example("police killed", language=language)) == 100
    assert RougeL()("police kill", example("police killed", language="es")) == 50


def test_plain_english_has_the_figure_of_rouge_score_to_the_last_digit() -> None:
    theirs, draw = RougeScorer(["rougeL"], use_stemmer=True), random.Random(0)
    texts = [" ".join(draw.choices(PIECES, k=draw.randrange(1, 30))) for _ in range(300)]
    assert len({RougeL()(a, example(b, language="en")) for a, b in itertools.pairwise(texts)}) > 100
    for a, b in itertools.pairwise(texts):
        if words(b, "en"):
            assert RougeL()(a, example(b, language="en")) == 100 * theirs.score(b, a)["rougeL"].fmeasure


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127)))
def test_any_ascii_has_the_figure_of_rouge_score(a: str, b: str) -> None:
    found = RougeL()(a, example(b, language="en"))
    wanted = 100 * RougeScorer(["rougeL"], use_stemmer=True).score(b, a)["rougeL"].fmeasure
    assert wanted == 0 if isinstance(found, Abstain) else found == wanted


@pytest.mark.parametrize("reference", ["👍", "...", "❤️", "—", "+", "👩‍👩‍👧"])
def test_rouge_l_abstains_where_no_reference_holds_a_word_whatever_the_answer(reference: str) -> None:
    for answer in (reference, "yes", "", "👎"):
        given = RougeL()(answer, example(reference, language="en"))
        assert isinstance(given, Abstain)
        assert given.reason == "no accepted answer holds a word: only symbols or punctuation"


def test_a_symbol_beside_words_among_the_accepted_answers() -> None:
    accepted = example("Yes.", "👍", language="en")
    assert [RougeL()(answer, accepted) for answer in ("yes", "👍", "👎", "", "no")] == [100, 100, 0, 0, 0]


def test_a_metric_says_for_which_languages_it_is_unfit() -> None:
    assert RougeL().unfit("en") is None
    assert RougeL().unfit("zh") is None
    assert "not stemmed" in str(RougeL().unfit("und"))
    assert ExactMatch().unfit("und") is None


@pytest.mark.parametrize(
    "answer, score",
    [
        ("x = 1", 100),
        ("", 0),
        ("   \n", 0),
        ("# only a comment", 0),
        ("def f(:", 0),
        ("```python\ndef f():\n    return 1\n```", 100),
        ("Here it is:\n\n```python\r\nx = 1\r\n```\nEnjoy!", 100),
        ("~~~\nx = 1\n~~~", 100),
        ("```python\nx = 1", 100),  # cut off before the fence was closed
        ("```python\nx = (\n```", 0),
        ("```\n```", 0),
        ("```python\n# nothing\n```", 0),
        ("```bash\nls -l\n```", 0),
        ('def f():\n    """Like so:\n\n    ```\n    not python here\n    ```\n    """\n    return 1', 100),
        ("Here is some prose.", 0),
        ("x = '\\d'", 100),  # a warning is no error
        ("a\0b", 0),
        ("(" * 5000, 0),
        ("-" * 100_000 + "1", 0),
        ("print 'x'", 0),
    ],
)
def test_python_parses_by_hand(answer: str, score: float) -> None:
    assert PythonParses()(answer, example("x")) == score


@pytest.mark.parametrize(
    "a, b, same",
    [
        ("print('a  b')", "print('a b')", False),  # blanks in a string are its value
        ('x  =  "a  b"  ', 'x = "a  b"', True),
        ("x = 'it\\'s  so'", "x = 'it\\'s so'", False),
        ("\tx", "x", True),  # answers come stripped
        ("if x:\n\ty", "if x:\n    y", False),
        ("a\u2028b", "a\nb", False),
        ("a\x0cb", "a b", True),
        ("a\u00a0b", "a b", False),  # no blank to Python
    ],
)
def test_blanks_of_code(a: str, b: str, same: bool) -> None:
    assert (whitespace_form(a) == whitespace_form(b)) == same
    assert same_code(a, b) == same_code(b, a) == same


@pytest.mark.parametrize(
    "a, b, same",
    [
        ('x = """a\n\nb"""', 'x = """a\nb"""', False),  # a blank line of a literal is its value
        ('x = """a\n  b  c"""', 'x = """a\n  b c"""', False),
        ('x = """a \nb"""', 'x = """a\nb"""', False),
        ("x = f'{y  =}'", "x = f'{y =}'", False),
        ('x = f"""{y}\n\n{z}"""', 'x = f"""{y}\n{z}"""', False),
        ("x = f'{{y}}'", "x = f'{y}'", False),
        ("x = 1  # don't  stop, it's fine", "x = 1  # don't stop, it's fine", True),
        ("x = 1  # one", "x = 1  # two", False),
        ("def f():\n    # it's\n\n\n    return  1", "def f():\n    # it's\n    return 1", True),
        ("if a:\n    b\n    c", "if a:\n    b\nc", False),
        ("f(a,\n  b)", "f(a, b)", True),
        ("ls -l", "ls - l", False),  # other languages are read as Python too
        ("x = 1\r\ny = 2", "x = 1\n\ny = 2", True),
        ("x = 'it", "x = 'it", True),
    ],
)
def test_programs_are_equal_when_their_tokens_are(a: str, b: str, same: bool) -> None:
    metric = ExactMatch(normalisation="whitespace")
    assert (metric(a, example(b)), metric(b, example(a))) == ((100, 100) if same else (0, 0))


def texts() -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text(
        "aI.'\"?! ¿ßİıςΣ\u0301\u200d巴दि👍", max_size=12
    )


@settings(deadline=None)
@given(texts())
def test_forms_are_forms(text: str) -> None:
    """A form is its own form, the same for NFC and NFD, and composed."""
    for form in (exact_form, key_form, whitespace_form, lambda text: exact_form(text, fold_case=False)):
        found = form(text)
        assert form(found) == found == form(unicodedata.normalize("NFD", text))
        assert unicodedata.is_normalized("NFC", found)


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=127), max_size=12))
def test_the_short_way_for_ascii_gives_the_same_keys(text: str) -> None:
    invisible = "\u2060"  # means nothing in a key, and makes a text go the long way
    assert key_form(text) == key_form(text + invisible)


@settings(deadline=None)
@given(texts(), texts(), st.sampled_from(["", "en", "tr", "und"]))
def test_no_text_breaks_a_metric(a: str, b: str, language: str) -> None:
    for kind in sorted(TextMetric.kinds):
        metric: Any = TextMetric.kinds[kind]()
        if not isinstance(metric, TextMetric):
            continue
        rows = [example(b, language=language), example(unicodedata.normalize("NFD", b), language=language)]
        given = [metric(a, row) for row in rows] + [metric(unicodedata.normalize("NFD", a), row) for row in rows]
        assert len({str(score) for score in given}) == 1
        assert isinstance(given[0], Abstain) or 0 <= given[0] <= 100


@settings(deadline=None)
@given(texts(), st.sampled_from(["", "en", "tr"]))
def test_identity_of_any_text(text: str, language: str) -> None:
    for metric in COMPARING.values():
        same = metric(text, example(text, language=language))
        assert isinstance(same, Abstain) or same == pytest.approx(100)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("น\u0e4d\u0e49\u0e32", "น\u0e49\u0e33", True),  # sara am typed in two parts, the tone between or before them
        ("น\u0e49\u0e4d\u0e32", "น\u0e49\u0e33", True),
        ("−3", "-3", True),
        ("10–20", "10-20", True),
        ("1\u00a0000", "1 000", True),
        ("\u200cسلام", "سلام", True),
        ("It is 2024!", "It is 2024.", True),
        ("n!", "n", False),
        ("(n - 1)!", "(n - 1)", False),
        ("3", "-3", False),
    ],
)
def test_what_a_reader_cannot_tell_apart_is_equal_and_a_formula_is_not(one: str, other: str, equal: bool) -> None:
    assert (exact_form(one) == exact_form(other)) is equal
