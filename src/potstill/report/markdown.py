"""Text of others in Markdown: shown as it is, never read as markup."""

import re
from typing import Any

from potstill.report.html import visible


def inline(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no markup, no HTML, no table cell ended early."""
    text = " ".join(visible(text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|~#]|\](?=[(\[:])|!(?=\[))", r"\\\1", text)


def code(text: Any) -> str:
    """Text in a code span, on one line."""
    text = " ".join(visible(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{text}{fence}" if "`" not in text else f"{fence} {text} {fence}"
