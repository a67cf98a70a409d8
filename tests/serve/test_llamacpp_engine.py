"""The served file: llama.cpp in its own process."""

import json
import os
import signal
import time
from importlib.util import find_spec

import pytest
from serving import answered, serving

from potstill.core.errors import UserError
from potstill.serve.shelf import Opening

pytestmark = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp is not here: pip install xllamacpp")
CHAT = "/v1/chat/completions"
ASKED = {"model": "student", "messages": [{"role": "user", "content": "¿Qué moneda usa Perú? 😀"}], "max_tokens": 24}


@pytest.fixture(scope="module")
def filed(pair, tmp_path_factory):
    """The student with a file of the same weights, and its teacher without one."""
    from dataclasses import replace

    from potstill.edges.models import load_model, load_tokenizer
    from potstill.exporters.gguf import Gguf

    student, teacher = pair
    folder = tmp_path_factory.mktemp("filed")
    tokenizer = load_tokenizer(student.where)
    (file,) = Gguf(types=("f32",)).write(load_model(student.where), tokenizer, {}, folder, name="student")
    return [replace(student, file=file), teacher]


def test_it_answers_stops_early_and_says_when_its_process_is_gone(filed):
    with serving(filed, opening=Opening("auto", context=1024, threads=1), teacher="teacher") as site:
        engine = site.opened.engine
        assert engine.runtime == "llama.cpp"
        status, raw, _ = site.post(CHAT, ASKED)
        found = json.loads(raw)
        example = json.loads(site.post(CHAT, {**ASKED, "stop": [found["choices"][0]["message"]["content"][3:5]]})[1])
        assert status == 200
        assert found["usage"]["completion_tokens"] == 24
        assert example["choices"][0]["finish_reason"] == "stop"
        # the same ids that torch reads
        assert found["usage"]["prompt_tokens"] == len(site.opened.prompt(_row(ASKED))[0])

        events = site.post("/playground/ask", {"model": "student", "prompt": "Hi", "max_tokens": 12})[1].decode().split("\n\n")
        told = [json.loads(event.removeprefix("data: ")) for event in events if event]
        said = "".join(event.get("text", "") for event in told)
        tint = next(event["tint"] for event in told if "tint" in event)
        assert "".join(text for text, _ in tint["pieces"]) == said
        assert engine.resident_bytes() > 1_000_000

        os.kill(engine._server.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        end = time.monotonic() + 10
        while not engine.trouble():
            assert time.monotonic() < end
            time.sleep(0.02)
        status, raw, _ = site.post(CHAT, ASKED)
        assert (status, json.loads(raw)["error"]["code"]) == (503, "model_unavailable")
        status, told = site.health()
        assert (status, told["status"]) == (503, "failed")
        assert "llama.cpp ended" in told["unavailable"]["student"]


def test_only_the_drawn_tokens_of_an_answer_are_known_without_its_end(filed):
    from potstill.edges.llamacpp_stream import Wish
    from potstill.edges.tokens import decode
    from potstill.serve.shelf import open_offer

    opened = open_offer(filed[0], Opening("llama.cpp", context=512, streams=1, threads=1))
    prompt, found = opened.text("Peru uses the"), []
    try:
        found = [answered(opened.engine, prompt, Wish(8, temperature=10.0, seed=seed)) for seed in range(60)]
    finally:
        opened.close()
    ended = opened.tokenizer.eos_token_id
    assert all(answer.ids[-1:] != [ended] for _, answer in found)
    stopped = [answer for _, answer in found if answer.finish == "stop"]
    whole = [(pieces, answer) for pieces, answer in found if answer.all_known]
    assert stopped
    assert 0 < len(whole) < len(found)
    for pieces, answer in whole:
        assert len(answer.ids) == answer.count - (answer.finish == "stop")
        assert decode(opened.tokenizer, answer.ids, {*opened.renderer.stop_ids, ended}) == "".join(pieces)


def test_a_file_that_is_cut_short_is_one_clear_error(filed, tmp_path):
    from dataclasses import replace

    from potstill.serve.shelf import open_offer

    cut = tmp_path / "cut.gguf"
    cut.write_bytes(filed[0].file.read_bytes()[:60_000])
    with pytest.raises(UserError, match=r"llama\.cpp does not take it"):
        open_offer(replace(filed[0], file=cut), Opening("llama.cpp", context=256, threads=1))


def test_a_file_that_is_removed_while_it_is_served_answers_on_and_another_is_refused(filed, tmp_path):
    from dataclasses import replace

    first, other = (replace(filed[0], id=name, file=tmp_path / f"{name}.gguf") for name in ("first", "other"))
    for one in (first, other):
        one.file.write_bytes(filed[0].file.read_bytes())
    with serving([first, other], opening=Opening("llama.cpp", context=256, streams=1, threads=1)) as site:
        wanted = site.post(CHAT, {**ASKED, "model": "first"})[1]
        for one in (first, other):
            one.file.unlink()
        status, raw, _ = site.post(CHAT, {**ASKED, "model": "first"})
        assert status == 200
        assert json.loads(raw)["choices"] == json.loads(wanted)["choices"]
        status, raw, _ = site.post(CHAT, {**ASKED, "model": "other"})
        assert (status, json.loads(raw)["error"]["code"]) == (503, "model_unavailable")
        assert "other cannot be opened" in json.loads(raw)["error"]["message"]
        assert site.health()[0] == 200


def test_llamacpp_is_asked_for_and_there_is_no_file(filed):
    with pytest.raises(UserError, match=r"no \.gguf file of teacher; add a stage of kind 'export'"):
        Opening("llama.cpp").file_of(filed[1])


def _row(asked):
    from potstill.core.types import Example

    return Example("", asked["messages"][0]["content"], "")
