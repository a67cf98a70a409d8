"""The playground's page: one file, which asks nobody but this server."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("playground.html")


@cache
def page() -> str:
    """Its HTML."""
    return FILE.read_text(encoding="utf-8")


def _hash_of(tag: str) -> str:
    found = re.search(rf"<{tag}>(.*?)</{tag}>", page(), re.DOTALL)
    assert found is not None, f"the page has no <{tag}>"
    return base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()


# its own script and style, by their hashes, and nothing else; no text can become markup (Trusted Types)
CSP = (
    f"default-src 'none'; script-src 'sha256-{_hash_of('script')}'; style-src 'sha256-{_hash_of('style')}'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
