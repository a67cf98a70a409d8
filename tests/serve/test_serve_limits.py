"""Bad requests, foreign pages, keys, full queues: the right status, at once, and the server goes on."""

import asyncio
import http.client
import json
import socket
import time

import pytest
from serving import offer, serving

from potstill.serve.app import Limits
from potstill.serve.shelf import Opening

CHAT = "/v1/chat/completions"
GOOD = {"model": "student", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
LONG = {**GOOD, "max_tokens": 6000, "stream": True}
JSON = {"Content-Type": "application/json"}


def changed(**more):
    return json.dumps({**GOOD, **more}).encode()


@pytest.mark.parametrize(
    "body, status, words",
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"[]", 400, "must be a JSON object, not list"),
        (b'{"model": NaN}', 400, "NaN is not JSON"),
        (b'{"a":' * 30_000, 400, "nested too deeply"),
        (b'{"model": "\xff"}', 400, "not UTF-8: byte 11 is 0xff"),
        (changed(messages=[{"role": "user", "content": "\ud800"}]), 400, "surrogate"),
        (b'{"model": ' + b"9" * 5000 + b"}", 400, "not JSON"),
        (changed(messages=[]), 400, "messages: list should have at least 1 item"),
        (changed(messages="Hi"), 400, "messages: input should be a valid list"),
        (changed(messages=[{"role": "user", "content": 5}]), 400, "messages.0.content"),
        (changed(messages=[{"role": "judge", "content": "x"}]), 400, "messages.0.role"),
        (changed(messages=[{"role": "assistant", "content": "x"}]), 400, "the last message must be the user's"),
        (changed(model=7), 400, "model: input should be a valid string"),
        (changed(max_tokens="9"), 400, "max_tokens: input should be a valid integer"),
        (changed(max_tokens=0), 400, "max_tokens: input should be greater than or equal to 1"),
        (changed(temperature=-1), 400, "temperature: "),
        (changed(stop=["a"] * 5), 400, "stop: list should have at most 4 items, not 5"),
        (changed(top_p=0), 400, "top_p: "),
        (changed(stop=["a"] * 5), 400, "stop: "),
        (changed(seed=2**70), 400, "seed: "),
        (changed(stream="yes"), 400, "stream: "),
        (changed(tools=[{"type": "function"}]), 400, "tools is not supported"),
        (changed(logprobs=True), 400, "logprobs is not supported"),
        (changed(logprobs=0), 400, "logprobs is not supported"),
        (changed(repetition_penalty=1.2), 400, "repetition_penalty is not supported"),
        (changed(ignore_eos=True), 400, "ignore_eos is not supported"),
        (changed(guided_json={"type": "object"}), 400, "guided_json is not supported"),
        (changed(max_token=5), 400, "max_token is not supported here; did you mean 'max_tokens'"),
        (changed(messages=[{**GOOD["messages"][0], "name": "Rosa"}]), 400, "messages.0.name is not supported"),
        (
            changed(messages=[{"role": "assistant", "tool_calls": [{}]}, GOOD["messages"][0]]),
            400,
            "messages.0.tool_calls is not",
        ),
        (changed(stream_options={"continuous_usage_stats": True}), 400, "stream_options.continuous_usage_stats is not"),
        (changed(model="x"), 404, "no model 'x'"),
    ],
)
def test_a_wrong_body_is_named(site, body, status, words):
    found, raw, _ = site.send("POST", CHAT, body, JSON)
    error = json.loads(raw)["error"]
    assert (found, error["type"]) == (status, "not_found_error" if status == 404 else "invalid_request_error")
    assert words in error["message"]


def test_harmless_fields_of_clients_are_let_through(site):
    neutral = {"n": 1, "presence_penalty": 0.0, "tools": [], "response_format": None, "logprobs": False, "min_tokens": 0}
    marks = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "prompt_cache_key": "x"}
    given_back = {"role": "assistant", "content": "Hi", "refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    turns = [GOOD["messages"][0], given_back, GOOD["messages"][0]]
    assert site.post(CHAT, {**GOOD, **neutral, **marks, "messages": turns})[0] == 200


def test_completions_refuse_what_would_be_left_out_and_name_their_own_field(site):
    asked = {"model": "student", "prompt": "Peru", "max_tokens": 2}
    for more, param in (
        ({"logprobs": 0}, "logprobs"),
        ({"max_completion_tokens": 9}, "max_completion_tokens"),
        ({"prompt": "loop sol " * 9000}, "prompt"),
        ({"prompt": "x " * 99_999}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
    ):
        status, raw, _ = site.post("/v1/completions", {**asked, **more})
        assert (status, json.loads(raw)["error"]["param"]) == (400, param)


def test_other_chunks_say_that_they_have_no_usage_where_one_has_it(site):
    for wanted in (True, False):
        asked = {**GOOD, "stream": True, "stream_options": {"include_usage": wanted, "include_obfuscation": False}}
        events = site.post(CHAT, asked)[1].decode().split("\n\n")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events if event and "[DONE]" not in event]
        found = [chunk.get("usage", "absent") for chunk in chunks]
        assert found[:-1] == [None if wanted else "absent"] * (len(found) - 1)
        assert isinstance(found[-1], dict) == wanted


def test_other_paths_methods_and_types_are_errors_of_the_same_form(site):
    for method, path, headers, status in (
        ("GET", "/v1/nothing", {}, 404),
        ("GET", CHAT, {}, 405),
        ("POST", CHAT, {"Content-Type": "text/plain"}, 415),  # what a form of another site could send
        ("POST", CHAT, {}, 415),
    ):
        found, raw, _ = site.send(method, path, b"{}" if method == "POST" else None, headers)
        assert (found, set(json.loads(raw)["error"])) == (status, {"message", "type", "param", "code"})


@pytest.mark.parametrize("head", ["Content-Length: 99999999999", "Transfer-Encoding: chunked"])
def test_a_huge_body_is_refused_before_it_is_read(site, head):
    with socket.create_connection(("127.0.0.1", site.port), 10) as sock:
        sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{head}\r\n\r\n".encode())
        if "chunked" in head:
            chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
            for _ in range(site.state.limits.body_bytes // 65536 + 1):
                sock.sendall(chunk)
        assert sock.recv(1000).startswith(b"HTTP/1.1 413")
    assert site.health()[0] == 200


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Host": "attacker.example"}, 403),  # DNS rebinding
        ({"Host": "127.0.0.1.attacker.example"}, 403),
        ({"Host": "known.example:9"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "localhost:80", "Origin": "http://localhost:80"}, 200),
        ({"Host": "localhost:80", "Origin": "http://localhost:81"}, 403),
        ({"Origin": "https://attacker.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_pages_of_other_sites_cannot_ask(pair, site, headers, status):
    with serving(pair, opened=site.opened, names=["known.example"]) as known:
        known.state.shelf.close = lambda: None  # type: ignore[method-assign]  # the model is another server's
        found, _, told = known.post(CHAT, GOOD, **headers)
        assert found == status
        assert not any(name.startswith("access-control-") for name in told)
        assert known.send("GET", "/v1/models", headers=headers)[0] == status


def test_a_key_is_asked_for_where_there_is_one(pair, site):
    with serving(pair, opened=site.opened, key="correct-horse") as locked:
        locked.state.shelf.close = lambda: None  # type: ignore[method-assign]
        for given in ("", "Bearer wrong", "Bearer ", "Basic correct-horse", "correct-horse", "Bearer ñ"):
            status, raw, told = locked.send(
                "GET", "/v1/models", headers={"Authorization": given.encode("latin-1").decode("latin-1")}
            )
            assert (status, told["www-authenticate"]) == (401, "Bearer")
            assert b"correct" not in raw
        for path in ("/v1/models", "/playground/models"):
            assert locked.send("GET", path)[0] == 401
            assert locked.send("GET", path, headers={"Authorization": "Bearer correct-horse"})[0] == 200
        assert locked.post(CHAT, GOOD)[0] == locked.post("/playground/ask", GOOD)[0] == 401
        assert locked.send("GET", "/")[0] == locked.send("GET", "/healthz")[0] == 200


def test_without_the_key_health_names_who_is_unavailable_and_no_reason(pair):
    with serving(pair, key="correct-horse") as locked:
        locked.opened.close()
        status, told = locked.health()
        assert (status, told["status"]) == (503, "failed")
        assert told["unavailable"] == {"student": "a request with the key says why"}
        status, raw, _ = locked.post(CHAT, GOOD, Authorization="Bearer correct-horse")
        assert status == 503
        assert b"does not answer any more: the server is stopping" in raw


def test_a_model_whose_files_are_gone_is_said_and_the_others_answer(pair, site, tmp_path):
    gone = offer(tmp_path / "gone", "gone")
    with serving([*pair, gone], opened=site.opened) as known:
        known.state.shelf.close = lambda: None  # type: ignore[method-assign]
        status, raw, _ = known.post(CHAT, {**GOOD, "model": "gone"})
        assert (status, json.loads(raw)["error"]["code"]) == (503, "model_unavailable")
        assert f"gone cannot be opened: {tmp_path / 'gone'}: no such file or folder" in json.loads(raw)["error"]["message"]
        assert known.post(CHAT, GOOD)[0] == known.health()[0] == 200


def begin(site, value):
    """A request on its way; the connection, once the first bytes of its answer are there."""
    sock = socket.create_connection(("127.0.0.1", site.port), 20)
    body = json.dumps(value).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body)
    assert sock.recv(1000).startswith(b"HTTP/1.1 200")
    return sock


def test_a_full_queue_is_said_with_when_to_come_back(pair):
    with serving(pair, opening=Opening("torch", 8192, streams=1), limits=Limits(max_tokens=8000, queue=0)) as site:
        first = begin(site, LONG)
        status, raw, told = site.post(CHAT, GOOD)
        assert (status, json.loads(raw)["error"]["code"]) == (429, "queue_full")
        assert 1 <= int(told["retry-after"]) <= 60
        assert site.health() == (200, {"status": "ok", "model": "student", "running": 1, "waiting": 0, "unavailable": {}})
        first.close()
        site.until_idle()
        assert site.post(CHAT, GOOD)[0] == 200


def test_an_answer_stops_when_its_client_goes(site):
    passes = []
    with site.opened.engine.paused() as model:
        hook = model.register_forward_hook(lambda *_: passes.append(1))
    try:
        for value in (LONG, {**LONG, "stream": False}):
            if value["stream"]:
                begin(site, value).close()
            else:
                sock = socket.create_connection(("127.0.0.1", site.port), 20)
                body = json.dumps(value).encode()
                sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
                sock.sendall(f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
                while not site.state.admission().running:
                    time.sleep(0.01)
                sock.close()
            site.until_idle()
            time.sleep(0.2)
            done = len(passes)
            time.sleep(0.3)
            assert len(passes) == done < 6000
    finally:
        hook.remove()


def test_a_stop_cuts_what_does_not_end_and_takes_nothing_more(pair, site):
    with serving(pair, opened=site.opened, limits=Limits(max_tokens=8000)) as stopping:
        stopping.state.shelf.close = lambda: None  # type: ignore[method-assign]
        sock = begin(stopping, LONG)
        stopping.state.stopping = "the server is stopping"
        status, raw, _ = stopping.post(CHAT, GOOD)
        assert (status, json.loads(raw)["error"]["code"]) == (503, "stopping")
        assert stopping.health()[1]["status"] == "stopping"
        asyncio.run_coroutine_threadsafe(_cut(stopping.state), stopping.loop).result(10)
        told = b""
        while more := sock.recv(1 << 16):
            told += more
            if told.endswith(b"0\r\n\r\n"):
                break
        sock.close()
        assert b'"code": "stopping"' in told  # OpenAI's client raises it
        assert b"[DONE]" not in told


async def _cut(state):
    state.cut()


def test_silent_connections_keep_nobody_out(pair, site):
    with serving(pair, opened=site.opened, connections=5, head_s=0.5) as small:
        small.state.shelf.close = lambda: None  # type: ignore[method-assign]
        kept = http.client.HTTPConnection("127.0.0.1", small.port, timeout=10)
        kept.request("GET", "/healthz")
        assert kept.getresponse().read()
        kept.sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: local")  # a second request that never gets further
        silent = [socket.create_connection(("127.0.0.1", small.port), 10) for _ in range(5)]
        for sock in silent[1:]:
            sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHo")
        assert [sock.recv(1000) for sock in (*silent, kept.sock)] == [b""] * 6
        assert small.health()[0] == 200
        for closing in (*silent, kept):
            closing.close()
        body = json.dumps(GOOD).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        with socket.create_connection(("127.0.0.1", small.port), 10) as slow:
            slow.sendall(head + str(len(body)).encode() + b"\r\n\r\n" + body[:9])
            time.sleep(0.8)  # a body has a limit of its own
            slow.sendall(body[9:])
            assert slow.recv(1000).startswith(b"HTTP/1.1 200")
