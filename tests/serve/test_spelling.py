"""Laws of text that comes piece by piece."""

from hypothesis import given
from hypothesis import strategies as st

from potstill.edges.spelling import Spelling, Stops

WORDS = "¿Qué moneda usa Perú? 😀 日本 for i in range(10):\n    print(i)"


def test_pieces_joined_are_the_whole_text(tokenizer):
    from potstill.edges.tokens import decode, encode

    ids = encode(tokenizer, WORDS)
    spelling = Spelling(tokenizer)
    pieces = [spelling.add(id) for id in ids]
    assert "".join(pieces) + spelling.end() == decode(tokenizer, ids) == WORDS
    assert len(pieces) > len([piece for piece in pieces if piece])  # some characters took several tokens
    assert not any("\ufffd" in piece for piece in pieces)


def test_broken_bytes_come_out_in_the_end(tokenizer):
    from potstill.edges.tokens import encode

    spelling = Spelling(tokenizer)
    half = encode(tokenizer, "😀")[:-1]
    assert "".join(spelling.add(id) for id in half) == ""
    assert spelling.end().strip("\ufffd") == ""


def test_hidden_tokens_are_not_shown(tokenizer):
    spelling = Spelling(tokenizer, {tokenizer.eos_token_id})
    assert spelling.add(tokenizer.eos_token_id) == ""
    assert spelling.end() == ""


@given(st.text("ab.", max_size=20), st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3), st.data())
def test_what_is_shown_ends_before_the_first_stop_string(text, strings, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    stops = Stops(strings)
    shown = "".join(map(stops.add, parts)) + stops.end()
    # stop strings end an answer when their last character has come; of those that end together the one that begins first counts
    ends = [text.find(string) + len(string) for string in strings if string in text]
    if not ends:
        assert shown == text
    else:
        assert stops.met
        assert text.startswith(shown)
        assert not any(string in shown for string in strings)
