"""Forms of a text in which two texts count as equal."""

import re
import unicodedata

_QUOTES = {
    '"': '"',
    "'": "'",
    "“": "”",
    "”": "”",
    "„": "“”",
    "‘": "’",
    "’": "’",
    "‚": "‘’",
    "«": "»",
    "»": "«»",
    "‹": "›",
    "›": "‹›",
    "「": "」",
    "『": "』",
    "《": "》",
    "＂": "＂",
}
_APOSTROPHE = re.compile(r"(?<=\w)['’](?=\w)")
_INVISIBLE = "\u200b\u200e\u200f\u061c\u2060\ufeff"  # blanks without width and marks of direction: nobody sees them at an end
_OUTER = _INVISIBLE + "".join(chr(code) for code in range(0x3001) if chr(code).isspace())
_NO_INVISIBLE = dict.fromkeys(map(ord, _INVISIBLE))
_FINAL, _LEADING = ".,;:!?", "¡¿"
_TURKIC = {"tr", "az"}  # I is the capital of ı there, and İ that of i

_STRING = re.compile(r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')""")
_BLANKS = " \t\f\v"


def nfc(text: str) -> str:
    """Unicode's composed form: letters with their marks are one character where there is one."""
    return unicodedata.normalize("NFC", text)


def primary(language: str) -> str:
    """The code of a language without its region or script: "en" of "en-US", "EN" and "eng"."""
    code = language.strip().lower().replace("_", "-").split("-")[0]
    return {"eng": "en", "tur": "tr", "aze": "az"}.get(code, code)


def fold(text: str, language: str = "") -> str:
    """Text without the difference of capital and small letters, one character for one; NFC in, NFC out.

    Simple case folding: ß stays apart from ss (Maße is not Masse), ς is σ, and Turkic i and ı stay apart.
    The Unicode Standard, 5.18.
    """
    if primary(language) in _TURKIC:
        text = text.replace("İ", "i").replace("I", "ı")
    if text.isascii():
        return text.lower()
    return nfc("".join(_folded(letter) for letter in text))


def _folded(letter: str) -> str:
    folded = letter.casefold()
    return folded if len(folded) == 1 else letter.lower()  # ẞ: its full folding "ss" would lose the letter


def exact_form(text: str, *, fold_case: bool = True, language: str = "") -> str:
    """The form in which an answer is compared with a reference: equal forms are equal answers.

    What does not count: Unicode's composition (NFC), outer white space, a pair of quotes around the whole, final `. , ; : ! ?`,
    leading `¡ ¿`, and case where `fold_case`. All else counts: `C#` is not `C++`, `3` not `-3`, `x²` not `x2`, `👎` not `👍`.
    A text of nothing but such marks keeps them, so that `"?"` equals neither `"!"` nor the empty text.
    """
    text = nfc(text).strip(_OUTER)
    if fold_case:
        text = fold(text, language)
    while (bare := _without_quotes(text).rstrip(_FINAL + _OUTER).lstrip(_LEADING + _OUTER).strip(_OUTER)) != text and bare:
        text = bare
    return text


def _without_quotes(text: str) -> str:
    """The text between two quotes that belong together and enclose all of it."""
    if len(text) < 2 or text[-1] not in _QUOTES.get(text[0], ""):
        return text
    inner = text[1:-1]
    return text if re.search(f"[{text[0]}{text[-1]}]", _APOSTROPHE.sub("", inner)) else inner


def whitespace_form(text: str) -> str:
    """Code without the blanks that mean nothing: NFC; blank lines and blanks at the end of a line out, runs of blanks to one.

    Indentation counts, because it is meaning in Python; that of the first line does not, because answers come stripped. Blanks
    between quotes count.
    """
    lines = re.split(r"\r\n|\r|\n", nfc(text).strip())
    return "\n".join(_blanks_folded(line.rstrip(_BLANKS)) for line in lines if line.strip())


def _blanks_folded(line: str) -> str:
    code = line.lstrip(_BLANKS)
    parts = _STRING.split(code)  # odd places are string literals
    folded = (part if i % 2 else re.sub(r"[ \t\f\v]+", " ", part) for i, part in enumerate(parts))
    return line[: len(line) - len(code)] + "".join(folded)


def key_form(text: str) -> str:
    """The form in which two questions, or two keys, are one: NFC, case folded, runs of white space one blank, none outside.

    Marks without width (zero-width space, byte-order mark, marks of direction) are left out.
    """
    folded = nfc(nfc(text).casefold())
    return " ".join(folded.translate(_NO_INVISIBLE).split())
