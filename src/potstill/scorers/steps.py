"""Steps that a text names: `Step 2:`, numbered lines, bullets and ordinals, in English and Spanish."""

import re
from collections.abc import Iterator

from potstill.scorers.code import without_blocks
from potstill.scorers.text import fold, nfc

_ORDINALS = (
    "first|firstly|second|secondly|third|thirdly|next|then|after that|finally|lastly",
    "primero|primeramente|en primer lugar|segundo|en segundo lugar|tercero|en tercer lugar|luego|después|a continuación|"
    "seguidamente|entonces|finalmente|por último|al final",
)
_DRESS = r"[ \t]*(?:#{1,6}[ \t]+)?(?:\*\*|__)?"
_STEP = re.compile(rf"^{_DRESS}(?:[-*•][ \t]+)?(?:\*\*|__)?(?:step|paso)[ \t]+(\d{{1,4}})[ \t]*(?:\*\*|__)?[:.)–-]", re.I)
_NUMBERED = re.compile(rf"^{_DRESS}\(?(\d{{1,4}})[.):](?=\s|\*|$)")
_BULLET = re.compile(r"^[ \t]*[-*•–][ \t]+")
_ORDINAL = re.compile(rf"(?:^[ \t]*(?:\*\*|__)?|(?<=[.!?;:]\s))({'|'.join(_ORDINALS)})(?:\*\*|__)?[,:]", re.I)
_SOMETHING = re.compile(r"\w")


def steps(text: str) -> int:
    """How many different steps a text names, fenced blocks left out.

    A line names a step by `Step k:` or `Paso k:`, by a number before a point or bracket, or by a bullet; an ordinal before a
    comma or colon (`First,` `Luego,` `Por último:`) does at the start of a line or of a sentence. What follows must hold a
    letter or a digit. A number, a bullet's text and an ordinal count once, however often they stand there.
    """
    return len(set(_named(nfc(without_blocks(text)))))


def _named(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        if found := _STEP.match(line) or _NUMBERED.match(line):
            if _SOMETHING.search(line, found.end()):
                yield "number", found[1].lstrip("0")
        elif (found := _BULLET.match(line)) and _SOMETHING.search(line, found.end()):
            yield "bullet", " ".join(fold(line[found.end() :]).split())
        else:
            for found in _ORDINAL.finditer(line):
                if _SOMETHING.search(line, found.end()):
                    yield "ordinal", fold(found[1])
