"""Texts on which tokenizers disagree, and plain ones to measure a model on where its own rows cannot be had."""

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

# question and answer, for models whose own rows cannot be had
CHATS = (
    (
        "Explain in three sentences how a pot still makes spirit.",
        "A pot still heats a fermented wash until the alcohol, which boils before the water, rises as vapour. The vapour "
        "passes through a neck into a cold coil and becomes liquid again. The first and the last part of the run are set "
        "aside, and the heart is kept.",
    ),
    (
        "Write a Python function that returns the median of a list of numbers.",
        "def median(numbers):\n    ordered = sorted(numbers)\n    middle = len(ordered) // 2\n    if len(ordered) % 2:\n"
        "        return ordered[middle]\n    return (ordered[middle - 1] + ordered[middle]) / 2\n",
    ),
    (
        "¿Por qué el cielo es azul durante el día?",
        "La luz del sol contiene todos los colores. Las moléculas del aire desvían la luz azul mucho más que la roja, y por "
        "eso el azul llega a nuestros ojos desde todas partes del cielo.",
    ),
    (
        "A train leaves at 9:40 and arrives at 12:05. How long is the journey?",
        "From 9:40 to 12:00 are 2 hours and 20 minutes. Then 5 more minutes pass until 12:05. The journey takes 2 hours and 25 "
        "minutes.",
    ),
)
