"""Forms of a text in which two texts count as equal."""

import io
import re
import tokenize
import unicodedata
from collections.abc import Iterator

import regex

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
_OUTER = _INVISIBLE + "\u200c\u200d" + "".join(chr(code) for code in range(0x3001) if chr(code).isspace())
_NO_INVISIBLE = dict.fromkeys(map(ord, _INVISIBLE))
_FINAL = regex.compile(r"[\p{Terminal_Punctuation}…]")  # of every script: . , ; : ! ? 。 、 । ؟ ۔ and their like
_EXCLAMATION = "!！﹗‼"
_SOME_WORD = regex.compile(r"\p{L}{2}")
_LEADING = "¡¿"
_STRAIGHT = str.maketrans({**dict.fromkeys("‘’‚‛ʼ＇", "'"), **dict.fromkeys("“”„‟＂", '"')})
_DASHES = dict.fromkeys(map(ord, "‐‑‒–—―−﹣－"), "-")
_GUILLEMETS = str.maketrans({**dict.fromkeys("‹›´`", "'"), **dict.fromkeys("«»", '"')})
_PLAIN = {**_NO_INVISIBLE, **_STRAIGHT, **_GUILLEMETS}  # one pass: nothing is replaced by what another would replace
_PLAIN_AFTER = {**_NO_INVISIBLE, **_STRAIGHT, **_DASHES}
_SARA_AM = re.compile("([\u0e48-\u0e4b\u0ec8-\u0ecb]?)[\u0e4d\u0ecd]([\u0e48-\u0e4b\u0ec8-\u0ecb]?)([\u0e32\u0eb2])")
_JOINED = {"\u0e32": "\u0e33", "\u0eb2": "\u0eb3"}
_NO_BREAK = dict.fromkeys(map(ord, "\u00a0\u2007\u202f"), " ")  # blanks that look like any other
_TURKIC = {"tr", "az"}  # I is the capital of ı there, and İ that of i

_STRING = re.compile(r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')""")
_BLANKS = " \t\f\v"


def nfc(text: str) -> str:
    """Unicode's composed form: letters with their marks are one character where there is one.

    Thai and Lao sara am too, which NFC leaves in two parts where it was typed so, a tone mark before, between or after them
    (the Unicode Standard, 16.1).
    """
    text = unicodedata.normalize("NFC", text)
    return text if text.isascii() else _SARA_AM.sub(_joined_sara_am, text)


def _joined_sara_am(found: re.Match[str]) -> str:
    before, between, vowel = found.groups()
    return f"{before}{between}{_JOINED[vowel]}"


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

    What does not count: Unicode's composition (NFC), outer white space, a pair of quotes around the whole, final punctuation of
    any script (Unicode's Terminal_Punctuation such as `. , ; : ! ? 。 । ؟`, and `…`), leading `¡ ¿`, whether quotes,
    apostrophes, dashes and minus signs are typographic or plain, whether a space may break, and case where `fold_case`. All
    else counts: `C#` is not `C++`, `3` not `-3`, `x²` not `x2`, `👎` not `👍`, and `5!` or `n!` (a factorial) not `5` or `n`.
    A text of nothing but such marks keeps them, so that `"?"` equals neither `"!"` nor the empty text.
    """
    text = nfc(text).translate({**_STRAIGHT, **_DASHES, **_NO_BREAK}).strip(_OUTER)
    if fold_case:
        text = fold(text, language)
    while (bare := _without_final(_without_quotes(text)).lstrip(_LEADING + _OUTER).strip(_OUTER)) != text and bare:
        text = bare
    return text


def _without_final(text: str) -> str:
    """The text without punctuation at its end; an exclamation mark that ends a formula is a factorial."""
    text = text.rstrip(_OUTER)
    while text and _FINAL.match(text[-1]) and not _factorial(text):
        text = text[:-1].rstrip(_OUTER)
    return text


def _factorial(text: str) -> bool:
    """Whether a text ends as a formula does: `5!`, `n!`, `(n - 1)!`; a text with a word of two letters is none."""
    if text[-1] not in _EXCLAMATION or _SOME_WORD.search(text):
        return False
    before = text.rstrip(_EXCLAMATION)[-1:]
    return before.isdigit() or before == ")" or before.islower()


def _without_quotes(text: str) -> str:
    """The text between two quotes that belong together and enclose all of it."""
    if len(text) < 2 or text[-1] not in _QUOTES.get(text[0], ""):
        return text
    inner = text[1:-1]
    return text if re.search(f"[{text[0]}{text[-1]}]", _APOSTROPHE.sub("", inner)) else inner


def same_code(a: str, b: str) -> bool:
    """Whether two programs differ in nothing but blanks that mean nothing.

    Where Python's `tokenize` reads both, their tokens are compared: string literals to the letter, indentation, comments with
    runs of blanks as one, and whether blanks stand between two tokens; blank lines and line ends within brackets do not count.
    Other texts are compared by `whitespace_form`.
    """
    tokens_a, tokens_b = _python_tokens(a), _python_tokens(b)
    if tokens_a is None or tokens_b is None:
        return whitespace_form(a) == whitespace_form(b)
    return tokens_a == tokens_b


def _python_tokens(text: str) -> list[tuple[str, str, bool]] | None:
    """Kind, text and whether blanks stand before it, of each token; None where the text is not Python."""
    code = re.sub(r"\r\n?", "\n", nfc(text)).strip()
    try:
        return list(_tokens(code))
    except (tokenize.TokenError, SyntaxError):
        return None


def _tokens(code: str) -> Iterator[tuple[str, str, bool]]:
    lines = code.split("\n")
    end = opened = (1, 0)
    begins = True  # a line of the program: what stands before its first token is indentation
    depth = 0  # of f-strings: blanks within `f"{x =}"` are part of its value, so that each counts as one literal
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "ERRORTOKEN":
            raise SyntaxError(token.string)
        if kind.endswith("STRING_START"):
            opened = opened if depth else token.start
            depth += 1
        if kind.endswith("STRING_END"):
            depth -= 1
            if not depth:
                yield "STRING", _between(lines, opened, token.end), opened != end and not begins
                end, begins = token.end, False
        elif depth or kind in ("NL", "ENDMARKER"):
            continue
        elif kind in ("NEWLINE", "INDENT", "DEDENT"):
            yield kind, token.string if kind == "INDENT" else "", False
            begins = True
        elif kind == "COMMENT":
            yield kind, " ".join(token.string.split()), False
            end = token.end
        else:
            yield kind, token.string, token.start != end and not begins
            end, begins = token.end, False


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """The text between two places, as `tokenize` counts lines and columns."""
    (first, left), (last, right) = start, end
    if first == last:
        return lines[first - 1][left:right]
    return "\n".join((lines[first - 1][left:], *lines[first : last - 1], lines[last - 1][:right]))


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
    """The form in which two questions, or two keys, are one; coarser than `exact_form`, because a key need only not part.

    Equal are texts that differ in Unicode's compatibility forms (NFKC: full-width marks, ligatures), case, white space, marks
    without width, typographic or straight quotes, apostrophes and dashes, and final punctuation of any script.
    """
    text = _ascii_key(text) if text.isascii() else _unicode_key(nfc(text))
    bare = text
    while bare and (bare[-1] == " " or _FINAL.match(bare[-1])):
        bare = bare[:-1]
    return bare.lstrip(_LEADING + " ") or text


def _unicode_key(text: str) -> str:
    text = text.translate(_PLAIN)
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.translate(_PLAIN_AFTER).split())


def _ascii_key(text: str) -> str:
    """The same, five times as fast, because Unicode's forms leave ASCII as it is."""
    return " ".join(text.replace("`", "'").lower().split())
