"""Final answers of worked problems: `#### 42`, `\\boxed{42}`, and numbers as languages write them."""

import re
from fractions import Fraction

from potstill.core.types import Abstain, Example
from potstill.scorers.text import exact_form, primary
from potstill.scorers.thoughts import answer_of

# Languages that write 1.234,5 for 1,234.5. Spanish of Mexico and Central America writes the point, so that where a number can
# be read in one way only, it is read in that way.
DECIMAL_COMMA = frozenset(
    ("es", "pt", "fr", "de", "it", "nl", "ca", "sv", "da", "no", "pl", "tr", "vi", "id", "ro", "ru", "uk", "bg", "el")
)

_SIGN = r"(?<![\w)])[-+−–]"
_CURRENCY = r"(?:\\?\$|US\$|€|£|¥|₹|S/\.?)"
_GROUPED = r"\d{1,3}(?:[\u00a0\u2009\u202f]\d{3})+(?:[.,]\d+)?"
_PLAIN = r"\d+(?:[.,]\d+)*"
_NUMBER = rf"(?:{_GROUPED}(?![\d])|{_PLAIN})(?:[eE][-+]?\d{{1,3}}(?!\w))?"
_LATEX = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_WRITTEN = re.compile(
    rf"(?<![\w.,/])(?P<sign>{_SIGN})?(?:{_CURRENCY}\s?(?P<inner>{_SIGN})?)?(?P<number>{_NUMBER})"
    r"(?:\s?/\s?(?P<under>\d+)(?![\d/]))?",
    re.ASCII,
)
_WHOLE = re.compile(rf"{_WRITTEN.pattern}\s?(?:\\?%|€|£|¥)?\.?", re.ASCII)
_LONGEST = 400  # digits; longer ones are no answers
_BOXED = "\\boxed{"


def marked(text: str) -> str | None:
    """What an answer marks as final: inside its last `\\boxed{…}` or after its last `####`, whichever comes later.

    None where it marks nothing. Braces inside a box must balance; after `####` the line counts.
    """
    text = answer_of(text)
    box, hashes = text.rfind(_BOXED), text.rfind("####")
    if max(box, hashes) < 0:
        return None
    if hashes > box:
        return text[hashes + 4 :].split("\n", 1)[0].strip()
    return _braced(text[box + len(_BOXED) :])


def _braced(text: str) -> str | None:
    depth = 1
    for at, letter in enumerate(text):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if not depth:
            return text[:at].strip()
    return None


def number(text: str, language: str = "") -> Fraction | None:
    """The number that a whole text is, exactly; None where it is none.

    Signs of currency and percent do not count, so `$5` is 5 and `50%` is 50, not 0.5. Fractions are `3/4` or `\\frac{3}{4}`.
    Which of point and comma parts decimals: see `numbers`.
    """
    text = _plain(text)
    found = _WHOLE.fullmatch(text)
    return _value(found, language) if found else None


def last_number(text: str, language: str = "") -> Fraction | None:
    """The last number of an answer; None where it holds none."""
    found = _all_numbers(answer_of(text), language)
    return found[-1] if found else None


def _all_numbers(text: str, language: str) -> list[Fraction]:
    values = (_value(match, language) for match in _WRITTEN.finditer(_plain(text)))
    return [value for value in values if value is not None]


def _plain(text: str) -> str:
    """Without LaTeX's and Markdown's dress."""
    text = _LATEX.sub(r"\1/\2", text).replace("\\,", "").replace("\\!", "").replace("{,}", ",").replace("\\%", "%")
    return re.sub(r"[*_`]+(?=$|\s)|\\[()\[\]]|\*\*", "", text).strip().removesuffix("$").strip()


def _value(found: re.Match[str], language: str) -> Fraction | None:
    value = _decimal(found["number"], language)
    if value is None:
        return None
    if found["under"]:
        if len(found["under"]) > _LONGEST or not int(found["under"]):
            return None
        value /= int(found["under"])
    negative = sum((found[part] or "+") != "+" for part in ("sign", "inner"))
    return -value if negative % 2 else value


def _decimal(written: str, language: str) -> Fraction | None:
    """The value of digits with points, commas and blanks between them; None where they cannot be read.

    Of two marks the one that comes last parts decimals. One mark that comes several times parts thousands. A single mark parts
    thousands where exactly three digits follow it, one to three stand before it, the first of them not 0, and it is the
    language's mark of thousands; else it parts decimals where it is a point or the language writes decimal commas.
    """
    if len(written) > _LONGEST:
        return None
    mantissa, _, exponent = written.lower().partition("e")
    digits = re.sub(r"\s", "", mantissa)
    point = _decimal_mark(digits, language)
    if point is None:
        return None
    whole, _, part = digits.partition(point) if point else (digits, "", "")
    groups = re.split("[.,]", whole)
    if len(groups) > 1 and not (1 <= len(groups[0]) <= 3 and all(len(group) == 3 for group in groups[1:])):
        return None
    return Fraction(f"{''.join(groups)}.{part or 0}") * Fraction(10) ** int(exponent or 0)


def _decimal_mark(digits: str, language: str) -> str | None:
    """The mark before decimals, "" where there are none; None where the digits are no number."""
    points, commas = digits.count("."), digits.count(",")
    if points and commas:
        last = max(".,", key=digits.rfind)
        return last if digits.count(last) == 1 else None
    if points + commas != 1:
        return ""
    mark = "." if points else ","
    before, _, after = digits.partition(mark)
    comma = primary(language) in DECIMAL_COMMA
    grouped = len(after) == 3 and 1 <= len(before) <= 3 and not before.startswith("0")
    if grouped and mark == ("." if comma else ","):
        return ""
    return mark if mark == "." or comma else None


def same_answer(text: str, reference: str, language: str = "") -> bool:
    """Whether an answer's final part equals that of a reference.

    Final is what is marked (`marked`), else the whole answer. Where the reference's final part is a number, the answer's must
    be the same number, exactly: what is marked may have words beside one number, and of an answer that marks nothing the last
    number counts. Else both must have the same `exact_form`.
    """
    wanted = _final(reference)
    value = number(wanted, language)
    if value is None:
        return bool(wanted.strip()) and exact_form(_final(text), language=language) == exact_form(wanted, language=language)
    said = number(_final(text), language)
    if said is None:
        found = _all_numbers(_final(text), language)
        said = found[-1] if found and (len(found) == 1 or marked(text) is None) else None
    return said == value


def _final(text: str) -> str:
    found = marked(text)
    return answer_of(text) if found is None else found


def judged_answer(text: str, example: Example) -> float | Abstain:
    """1.0 where an answer is the `same_answer` as an accepted one, else 0.0; no score of rows that accept no answer, or that
    ask for a program by tests."""
    if example.tests is not None:
        return Abstain("the row asks for a program, which its tests judge")
    accepted = [reference for reference in example.references if _final(reference).strip()]
    if not accepted:
        return Abstain("no accepted answer says anything")
    return float(any(same_answer(text, reference, example.language) for reference in accepted))
