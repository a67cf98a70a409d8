"""llama.cpp in a process of its own: what it does not take ends that process, and never ours."""

import io
import json
import socket
import subprocess
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from llamacpp import needs_llamacpp
from tiny_parts import chat_tokenizer, tiny_model

from potstill.edges import llamacpp
from potstill.edges.llamacpp import Refused, Served, answers_of, served, timed
from potstill.edges.llamacpp_stream import TokenStream, Wish
from potstill.exporters.gguf import Gguf


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = chat_tokenizer(320)
    model = tiny_model("qwen2", len(tokenizer), eos=tokenizer.eos_token_id, std=0.3)
    return Gguf(types=("f32",)).write(model, tokenizer, {}, tmp_path_factory.mktemp("gguf"))[0]


def test_a_runtime_that_is_absent_or_too_old_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "PACKAGE", "no_such_runtime")
    assert llamacpp.runtime_problem() == "llama.cpp is not here; pip install 'potstill[device]'"
    monkeypatch.setattr(llamacpp, "PACKAGE", "pytest")  # any package that is here
    monkeypatch.setattr(llamacpp, "OLDEST", (9999, 1))
    assert "is older than 9999.1; pip install --upgrade 'potstill[device]'" in (llamacpp.runtime_problem() or "")


@needs_llamacpp
@pytest.mark.parametrize(("kept", "words"), [(0.6, "not within the file bounds"), (0.01, "failed to"), (0.0, "failed to")])
def test_a_file_cut_short_is_refused_in_the_runtimes_words(kept: float, words: str, file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(Refused, match=words):
        answers_of(cut, texts=["a"])
    with pytest.raises(Refused, match=words), served(cut):
        pass


@needs_llamacpp
def test_a_server_answers_while_inside_and_is_gone_afterwards(file: Path) -> None:
    with served(file, context=64, parallel=2, alias="tiny") as server:
        assert server.alive()
        with urllib.request.urlopen(f"{server.url}/v1/models") as answer:
            assert json.loads(answer.read())["data"][0]["id"] == "tiny"
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(Refused, match="couldn't bind"), served(file, port=port):
            pass
    assert not server.alive()
    assert not psutil.pid_exists(server.pid)


@needs_llamacpp
def test_a_proxy_is_not_asked_for_what_is_on_this_machine(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody is there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert answers_of(file, texts=["a"]).ids[0]
    with served(file, context=64) as server:
        assert timed(server, [5, 6, 7], 4).tokens_per_s > 0


def test_a_server_that_is_silent_or_dies_within_its_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "SILENT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, subprocess.Popen(["sleep", "60"], text=True) as process:
        server = Served(f"http://127.0.0.1:{silent.getsockname()[1]}", process.pid, 0, process, io.BytesIO())
        with pytest.raises(Refused, match="timed out"):
            timed(server, [5], 2)
        silent.accept()[0].close()  # the connection that nobody answered
        monkeypatch.undo()

        def cut() -> None:
            with silent.accept()[0] as connection:
                heard = b""
                while not heard.endswith(b"}"):  # what is left unread would be a reset
                    heard += connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\ndata: {")

        thread = threading.Thread(target=cut)
        thread.start()
        with pytest.raises(Refused, match="IncompleteRead"):
            timed(server, [5], 2)
        thread.join()
        process.kill()


def test_a_server_that_answers_in_another_form_is_told_and_leaves_nobody_waiting() -> None:
    class Strange(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'data: {"content": "no tokens beside it"}\n\n')

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Strange) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(Refused, match="KeyError: 'tokens'"):
            list(TokenStream(url, [5], Wish(4), chat_tokenizer(), hidden=frozenset()))
        server.shutdown()


@needs_llamacpp
def test_a_draft_writes_what_the_model_alone_writes(file: Path) -> None:
    def text(**more: Any) -> str:
        with served(file, context=64, kv="f32", **more) as server:
            body = json.dumps({"prompt": "Say amber", "n_predict": 12, "temperature": 0}).encode()
            asked = urllib.request.Request(f"{server.url}/completion", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(asked) as answer:
                found = json.loads(answer.read())
        assert ("draft_n" in found["timings"]) is bool(more)
        return found["content"]

    assert text(draft=file) == text()


@needs_llamacpp
def test_prompts_that_share_their_beginning_have_the_same_distributions(file: Path) -> None:
    prompts = [[5, 6, 7], [5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 10]]
    heard: list[float] = []
    shared = answers_of(file, prompts, reuse=True, heard=lambda: heard.append(time.monotonic())).logp_V
    alone = answers_of(file, prompts).logp_V
    assert len(heard) == len(prompts)
    for one, other in zip(shared, alone, strict=True):
        assert abs(one - other).max() < 1e-4
