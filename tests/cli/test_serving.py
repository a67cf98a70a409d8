"""potstill serve as a program: where it is, what it refuses, how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from tiny_run import call


def test_a_server_says_where_it_is_and_ends_well_when_it_is_stopped(finished):
    words = [sys.executable, "-m", "potstill", "serve", f"{finished.out}:sft", "--port", "0", "--context", "128"]
    path = os.pathsep.join(part for part in sys.path if part)
    server = subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    )
    assert server.stdout is not None
    try:
        url = next(line.split()[2] for line in server.stdout if line.startswith("OpenAI's API"))
        with urllib.request.urlopen(f"{url}/models", timeout=30) as answer:
            assert [model["id"] for model in json.loads(answer.read())["data"]] == ["sft", "base"]
        asked = {
            "model": "sft",
            "messages": [{"role": "user", "content": "What is 1 plus 1?"}],
            "max_tokens": 60,
            "stream": True,
        }
        request = urllib.request.Request(
            f"{url}/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            first = answer.readline()
            server.send_signal(signal.SIGTERM)
            rest = answer.read()
        assert first.startswith(b"data: {")
        assert rest.endswith(b"data: [DONE]\n\n")  # the answer on its way was finished
        assert server.stdout.read().endswith("stopped\n")
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def test_a_port_in_use_is_said_before_the_model_is_read(finished):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = call("serve", f"{finished.out}:sft", "--port", str(taken.getsockname()[1]))
    assert result.exit_code == 2
    assert "cannot be had (Address already in use); choose another with --port" in result.output
    assert "opening" not in result.output


@pytest.mark.parametrize(
    "words, said",
    [
        (["RUN:nothing"], "no model 'nothing'"),
        (["nowhere"], "no run there"),
        (["nothing.gguf"], "no such file"),
        (["RUN", "--models", "sft,nothing"], "no model 'nothing'"),
        (["RUN", "--host", "no-such-host.invalid"], "no such address"),
        (["RUN", "--host", "0.0.0.0"], "--host 0.0.0.0: other machines could ask without a key; give one by --key-env NAME"),
        (["RUN", "--host", "::"], "or say --no-key if everybody who reaches this machine may ask"),
        (["RUN", "--no-key", "--key-env", "PATH"], "leave out one of the two"),
        (["RUN", "--key-env", "POTSTILL_NO_SUCH_KEY"], "a key has at least 8"),
        (["RUN", "--key-file", "missing"], "cannot be read"),
        (["RUN", "--draft", "nothing.gguf"], "no such file"),
        (["RUN", "--draft", "RUN:nothing"], "no model 'nothing'"),
        (["RUN", "--draft-tokens", "4"], "--draft-tokens is for --draft"),
        (["RUN", "--draft", "RUN", "--engine", "torch"], "leave --engine torch out"),
    ],
)
def test_what_cannot_be_served_is_one_clear_error(finished, words, said):
    result = call("serve", *(word.replace("RUN", str(finished.out)) for word in words), "--port", "0")
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "host, key, without",
    [("127.0.0.1", "", False), ("localhost", "", False), ("0.0.0.0", "correct-horse", False), ("0.0.0.0", "", True)],
)
def test_a_key_is_asked_for_only_where_other_machines_can_ask(host, key, without):
    from potstill.serve.running import Address, check_key

    check_key(Address(host, 0), key, without=without)


def test_a_key_file_that_everybody_can_read_is_refused(finished, tmp_path):
    file = tmp_path / "key"
    file.write_text("correct-horse\n")
    file.chmod(0o644)
    result = call("serve", str(finished.out), "--key-file", str(file))
    assert (result.exit_code, "chmod 600" in result.output) == (2, True)
    from potstill.serve.running import key_of

    file.chmod(0o600)
    assert key_of(file, None) == "correct-horse"


def test_without_its_packages_serving_says_what_to_install(finished, monkeypatch):
    from potstill.serve import installed

    found = installed.find_spec
    monkeypatch.setattr(installed, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    result = call("serve", str(finished.out))
    assert (result.exit_code, result.output) == (2, "error: serving needs uvicorn; pip install 'potstill[serve]'\n")


def test_a_file_is_chatted_with_by_llamacpp(finished, tmp_path):
    pytest.importorskip("xllamacpp")
    from potstill.edges.models import load_model, load_tokenizer
    from potstill.exporters.gguf import Gguf

    where = f"path:{finished.artifact('sft')}"
    (file,) = Gguf(types=("f32",)).write(load_model(where), load_tokenizer(where), {}, tmp_path, name="tiny")
    result = call("chat", str(file), "--prompt", "What is 1 plus 1?", "--max-new-tokens", "8")
    assert (result.exit_code, len(result.output) > 1) == (0, True)
    file.write_bytes(file.read_bytes()[:20_000])
    assert call("chat", str(file), "--prompt", "x").exit_code == 2
    assert call("chat", str(tmp_path / "none.gguf")).exit_code == 2
