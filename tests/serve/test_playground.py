"""The playground in a real browser."""

import time

import pytest
from browser import chromium, needs_chromium
from serving import offer, serving

from potstill.serve.engine import End, Piece
from potstill.serve.page import CSP, page
from potstill.serve.shelf import Opened, Opening

MARKUP = "<img src=x onerror='window.hurt=1'><script>window.hurt=2</script> </span>&lt;b&gt; <b>bold</b>"


class Parrot:
    """An engine that always says the same."""

    runtime, most, positions, drafts = "parrot", 4, 1000, None

    def begin(self, prompt, wish, say):
        for n, word in enumerate(MARKUP.split(" "), 1):
            say(Piece(word + " ", (n,), n))
        say(End("stop", n))
        return lambda: None

    def trouble(self):
        return ""

    def resident_bytes(self):
        return 1_000_000

    def close(self):
        pass


@pytest.fixture(scope="module")
def page_of(pair, tmp_path_factory):
    """The page of a student and its teacher."""
    with (
        serving(pair, opening=Opening("torch", 8192), teacher="teacher") as site,
        chromium(tmp_path_factory.mktemp("b")) as found,
    ):
        found.open(f"{site.url}/", 1280, 900)
        found.wait("document.querySelectorAll('#models input').length === 2")
        yield site, found


def ask(found, prompt, most=12):
    found.value(f"document.getElementById('prompt').value = {prompt!r}; document.getElementById('most').value = {most}")
    found.value("document.getElementById('prompt').focus()")
    found.press("Enter", 13, ctrl=True)


def done(found):
    found.wait("!document.getElementById('ask').disabled && document.querySelectorAll('#columns article').length")


@needs_chromium
def test_every_token_is_tinted_by_its_distance_from_the_teacher(page_of):
    _, found = page_of
    ask(found, "What currency does Peru use?")
    done(found)
    assert found.value("[...document.querySelectorAll('#columns .error')].length") == 0
    student, teacher = "#column-0", "#column-1"
    nats = found.value(f"[...document.querySelectorAll('{student} .answer span')].map((s) => Number(s.dataset.nats))")
    assert len(nats) > 1
    assert max(nats) > 0
    shade = (
        f"getComputedStyle([...document.querySelectorAll('{student} .answer span')][{nats.index(max(nats))}]).backgroundColor"
    )
    assert found.value(shade) != "rgba(0, 0, 0, 0)"
    assert found.value(f"document.querySelectorAll('{teacher} .answer span').length") == 0
    facts = found.value(f"document.querySelector('{student} dl').innerText")
    assert all(word in facts for word in ("tokens/s", "weights on disk", "memory", "nats"))


@needs_chromium
def test_the_page_asks_nobody_else_and_breaks_no_rule_of_its_own(page_of):
    site, found = page_of
    urls = set(found.requests)
    assert urls
    assert all(url.startswith((f"{site.url}/", "data:")) for url in urls)
    assert found.said == []
    assert "unsafe" not in CSP
    assert "default-src 'none'" in CSP
    assert not any(word in page() for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("))


@needs_chromium
def test_escape_stops_an_answer_on_the_server_too(page_of):
    site, found = page_of
    ask(found, "What is the capital of France?", most=7000)
    found.wait("document.querySelector('#column-0 .answer').textContent.length > 5")
    found.press("Escape", 27)
    done(found)
    assert found.value("document.getElementById('told').textContent") == "stopped"
    site.until_idle()


@needs_chromium
def test_it_fits_a_phone(page_of):
    _, found = page_of
    found.resize(390, 844)
    assert found.value("document.documentElement.scrollWidth") <= 390
    small = "[...document.querySelectorAll('button')].filter((b) => b.offsetHeight && b.offsetHeight < 32).length"
    assert found.value(small) == 0
    found.resize(1280, 900)


@needs_chromium
def test_every_control_has_a_name_in_both_languages(page_of):
    _, found = page_of
    found.value("document.getElementById('es').click()")
    assert found.value("document.documentElement.lang") == "es"
    assert "Preguntar" in found.value("document.getElementById('ask').innerText")
    assert found.value("document.querySelector('#column-1 .role').textContent") == "maestro"
    nodes = found.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "textbox", "checkbox", "spinbutton", "article", "group")
    unnamed = [node for node in nodes if node.get("role", {}).get("value") in roles and not node.get("name", {}).get("value")]
    assert unnamed == []
    words = [
        found.value(f"Object.keys(TEXTS.{language}.roles).concat(Object.keys(TEXTS.{language}))") for language in ("en", "es")
    ]
    assert words[0] == words[1]
    found.value("document.getElementById('en').click()")


@needs_chromium
def test_an_answer_is_never_read_as_markup_and_a_key_is_asked_for(pair, site, tmp_path):
    parrot = Opened(offer("/nowhere", "parrot", "kd"), site.opened.tokenizer, site.opened.renderer, Parrot(), 1)
    with serving([parrot.offer], opened=parrot, key="correct-horse") as locked, chromium(tmp_path) as found:
        found.open(f"{locked.url}/", language="es-PE")
        found.wait("!document.getElementById('keyrow').hidden")
        assert found.value("document.getElementById('told').textContent") == "Este servidor pide una clave."
        found.value("document.getElementById('key').value = 'correct-horse'; document.getElementById('open').click()")
        found.wait("document.querySelectorAll('#models input').length === 1")
        ask(found, MARKUP)
        done(found)
        assert found.value("document.querySelector('#column-0 .answer').textContent").strip() == MARKUP
        assert found.value("document.querySelectorAll('#columns img, #columns script, #columns b').length") == 0
        time.sleep(0.2)
        assert found.value("window.hurt === undefined")
        refused = [text for text in found.said if "401" not in text]  # the first request, without the key
        assert refused == []


def test_the_page_holds_no_address_of_elsewhere():
    assert "http://" not in page()
    assert "https://" not in page()
