"""Final answers: what is a number, in which language, and when two answers are one."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.scorers.numbers import DECIMAL_COMMA, last_number, marked, number, same_answer


@pytest.mark.parametrize(
    ("text", "language", "value"),
    [
        ("42", "en", "42"),
        ("-42", "en", "-42"),
        ("−42", "en", "-42"),
        ("+42", "en", "42"),
        ("42.", "en", "42"),
        (" 42 ", "en", "42"),
        ("007", "en", "7"),
        ("3.50", "en", "7/2"),
        ("1,234", "en", "1234"),
        ("1,234.5", "en", "1234.5"),
        ("1,234,567", "en", "1234567"),
        ("1,5", "en", None),
        ("1,23,456", "en", None),
        ("12,34", "en", None),
        ("1.234", "en", "1.234"),
        ("1.234", "es", "1234"),
        ("0.234", "es", "0.234"),
        ("1234.567", "es", "1234.567"),
        ("1.5", "es", "1.5"),
        ("1,5", "es", "1.5"),
        ("1,234", "es", "1.234"),
        ("1.234,5", "es", "1234.5"),
        ("1,234.5", "es", "1234.5"),
        ("1.234.567,89", "es-MX", "1234567.89"),
        ("1.234.567", "en", "1234567"),
        ("1.2.3", "en", None),
        ("1,234.5.6", "en", None),
        ("1\u202f234,5", "fr", "1234.5"),
        ("1 234", "en", None),
        ("3/4", "en", "3/4"),
        ("-3/4", "en", "-3/4"),
        ("3 / 4", "en", "3/4"),
        ("1/0", "en", None),
        ("1/2/3", "en", None),
        ("\\frac{3}{4}", "en", "3/4"),
        ("\\dfrac{-3}{4}", "en", "-3/4"),
        ("$5", "en", "5"),
        ("-$5.25", "en", "-5.25"),
        ("$-5.25", "en", "-5.25"),
        ("\\$5", "en", "5"),
        ("US$ 1,000", "en", "1000"),
        ("5 €", "es", "5"),
        ("50%", "en", "50"),
        ("50 \\%", "en", "50"),
        ("$42$", "en", "42"),
        ("**42**", "en", "42"),
        ("\\(42\\)", "en", "42"),
        ("1e3", "en", "1000"),
        ("2.5E-1", "en", "1/4"),
        ("", "en", None),
        ("-", "en", None),
        ("--3", "en", None),
        ("x = 3", "en", None),
        ("3 apples", "en", None),
        ("three", "en", None),
        ("9" * 401, "en", None),
        ("٣", "ar", None),
    ],
)
def test_whole_texts(text: str, language: str, value: str | None) -> None:
    assert number(text, language) == (None if value is None else Fraction(value))


@given(st.integers(-(10**12), 10**12), st.sampled_from(["en", "es", "", "de"]))
def test_integers_are_read_as_they_are_and_with_the_languages_groups(value: int, language: str) -> None:
    assert number(str(value), language) == value
    group = "." if language in DECIMAL_COMMA else ","
    assert number(f"{value:,}".replace(",", group), language) == value


@given(st.decimals(-(10**6), 10**6, places=2), st.sampled_from(["en", "es"]))
def test_decimals_are_exact(value, language: str) -> None:
    written = f"{value:,.2f}"
    if language == "es":
        written = written.translate(str.maketrans(",.", ".,"))
    assert number(written, language) == Fraction(value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a\n#### 12", "12"),
        ("#### 1\n#### 2\nmore", "2"),
        ("\\boxed{12}", "12"),
        ("\\boxed{\\frac{1}{2}} or so", "\\frac{1}{2}"),
        ("#### 1 then \\boxed{2}", "2"),
        ("\\boxed{2} then #### 1", "1"),
        ("\\boxed{2", None),
        ("<think>#### 1</think>\\boxed{2}", "2"),
        ("<think>\\boxed{1}", None),
        ("12", None),
    ],
)
def test_what_is_marked(text: str, found: str | None) -> None:
    assert marked(text) == found


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5 - 3 = 2", 2),
        ("it is -7", -7),
        ("from 10-20", 20),
        ("x=-3 and y", -3),
        ("2 + 2 = 4.", 4),
        ("about $1,200 a month", 1200),
        ("3/4 of it", Fraction(3, 4)),
        ("nothing", None),
        ("<think>7</think>", None),
        ("<think>7", None),
    ],
)
def test_last_numbers(text: str, value: object) -> None:
    assert last_number(text, "en") == value


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [
        ("18", "so 9 * 2 = 18\n#### 18", True),
        ("#### 18.00", "#### 18", True),
        ("#### 18 dollars", "#### 18", True),
        ("#### 18 of 20", "#### 18", False),  # which of the two
        ("She makes $18 a day.", "#### 18", True),
        ("first 18, then 19", "#### 18", False),
        ("18 #### 19", "#### 18", False),
        ("<think>18</think>", "#### 18", False),
        ("<think>19</think>\n<answer>18</answer>", "#### 18", True),
        ("\\boxed{0.75}", "#### 3/4", True),
        ("0.7500001", "#### 3/4", False),
        ("Paris.", "paris", True),
        ("It is Paris", "Paris", False),
        ("", "Paris", False),
        ("1900", "In 1900 he left", False),
        ("In 1900 he left.", "in 1900 he left", True),
        ("anything", "", False),
    ],
)
def test_same_answers(text: str, reference: str, same: bool) -> None:
    assert same_answer(text, reference, "en") is same


def test_languages_decide() -> None:
    assert same_answer("1,5", "1.5", "es")
    assert not same_answer("1,5", "1.5", "en")
    assert same_answer("1.500", "1500", "es")
    assert not same_answer("1.500", "1500", "en")
