"""Eighty texts on which tokenizers disagree, in NFC."""

import random
import unicodedata

_TEXTS = [
    "", " ", "  ", "   ", "\n", "\n\n", "\n\n\n", " \n", "\n ", "\t", "\r\n", " \t \n ", "a", " a", "a ", "  a  ", "a  b",
    "a   b", "▁", "▁a", " ▁a", "a▁b", "▁ ▁", "It's 12 o'clock: don't wait!", "I'M I'm we'LL", "hello world",
    " hello  world ", "The still heats the wash until its spirit rises.", "no, no, no: banana bandana",
    "aaaa aaaaaaa aaaaaaaaaaaaa", "-----=======--", "naïve café", "¿Qué tal, señor? ¡Mañana, sí!",
    "La capital del Perú es Lima, ¿verdad?", "ﬁne ½ ² ™", "日本語", "日本語 と 中文", "สวัสดี", "مرحبا", "Привет, мир",
    "👍🏽", "👩‍👩‍👧‍👦 family", "e\u0301", "\u00a0nbsp\u3000wide", "\u200bzero\u200dwidth", "\ufeffbom",
    "\x01\x04a\x04b", "\x7f", "\U000f0000", "\ue000", "1234567", "3.14 x² 1,000,000", "0x1F 1e-9",
    "def f(x):\n\treturn x+1", "for i in range(10):\n    print(i)\n\n\n# end", "{'a': [1, 2], \"b\": null}",
    "https://example.org/a?b=c&d=%20#e", "a@b.co", "C:\\Users\\me", "$x^2 + y_1$", "<b>bold</b> <i>it</i>",
    "<table><tr><td>1</td></tr></table>", "<0x41>", "<0x0A> <0xFF>", "<unk>", "<s>", "<s>a", "<s> a", "<s>  a", "a<s>b",
    "a <s> b", "<s><s>", "[PAD310]", "<unused5> <mask>", "user\nhi\n\nassistant\n", "ĳ Ĳ ŉ", "A\u030a vs Å",
    "ᄒ\u1161\u11ab 한", "ΑΒΓ αβγ ς", "x" * 200, "ab" * 60, " " * 70, "\n" * 40, "end of line   \n   begin",
]  # fmt: skip

TEXTS = [unicodedata.normalize("NFC", text) for text in _TEXTS]
assert len(set(TEXTS)) >= 80


def random_texts(count: int, signs: str, longest: int = 40, seed: int = 0) -> list[str]:
    """Texts of these signs in any order, where merges compete."""
    draw = random.Random(seed)
    return ["".join(draw.choice(signs) for _ in range(draw.randint(1, longest))) for _ in range(count)]
