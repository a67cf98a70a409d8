"""What llama.cpp makes of a file, asked in a process of its own: it aborts on files that it cannot take.

Run as a program it reads one question as JSON from its input and writes the answer as JSON.
"""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

needs_llamacpp = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp is not here: pip install xllamacpp")


class Refused(Exception):
    """llama.cpp did not take the file; holds its last words."""


def ask(
    file: Path,
    prompts: Sequence[list[int]] = (),
    texts: Sequence[str] = (),
    words: int = 0,
    spelt: Sequence[list[int]] = (),
) -> dict[str, Any]:
    """What llama.cpp answers.

    Args:
        prompts: token ids; `logp` of the answer holds for each the next token's log-probabilities by id.
        texts: `ids` of the answer holds for each its token ids, special tokens read as such.
        words: when set, `answers` holds instead of `logp` the greedy text of so many tokens after each prompt, and why
            it ended: "stop" or "length".
        spelt: token ids; `texts` of the answer holds what they spell.

    Raises:
        Refused: llama.cpp could not open the file, or died.
    """
    question = json.dumps(
        {"file": str(file), "prompts": list(prompts), "texts": list(texts), "words": words, "spelt": list(spelt)}
    )
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, __file__], input=question, text=True, capture_output=True, env={**os.environ, "PYTHONPATH": path}
    )
    if done.returncode:
        raise Refused(done.stderr[-4000:])
    answer = json.loads(done.stdout.splitlines()[-1])
    answer["logp"] = [{int(id): value for id, value in logp.items()} for logp in answer["logp"]]
    return answer


@contextmanager
def served(file: Path, positions: int = 0) -> Iterator[str]:
    """Where llama.cpp's server answers OpenAI's API for a file, while inside.

    Args:
        positions: of its context; 0: the model's own.
    """
    path = os.pathsep.join(p for p in sys.path if p)
    server = subprocess.Popen(
        [sys.executable, __file__, str(file), str(positions)],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        lines = (line.strip() for line in server.stdout)
        url = next((line for line in lines if line.startswith("http://")), None)
        if url is None:
            raise Refused(f"no server for {file}")
        yield f"{url}/v1"
    finally:
        server.stdin.close()
        server.stdout.close()
        server.wait()


def _serve(file: str, positions: int) -> None:
    server = _server(file, positions)  # it ends when nobody holds it
    print(f"\n{server.listening_address}", flush=True)
    sys.stdin.read()
    os._exit(0)


def _server(file: str, positions: int = 0) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx = file, positions
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_parallel, params.warmup, params.fit_params, params.n_gpu_layers, params.verbosity = 1, False, False, 0, 3
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(params)


def _main() -> None:
    question = json.loads(sys.stdin.read())
    server = _server(question["file"])

    def post(path: str, body: Any = None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        asked = urllib.request.Request(server.listening_address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked) as answer:
            return json.loads(answer.read())

    def complete(prompt: list[int], **more: Any) -> Any:
        return server.handle_completions({"prompt": prompt, "temperature": 0, "cache_prompt": False, **more})["choices"][0]

    answer: dict[str, Any] = {"logp": [], "ids": [], "texts": [], "answers": [], "props": post("/props")}
    letter = post("/tokenize", {"content": "a"})["tokens"][0]
    for prompt in question["prompts"]:
        if question["words"]:
            found = complete(prompt, max_tokens=question["words"])
            answer["answers"].append([found["text"], found["finish_reason"]])
            continue
        # a printable token is forced, because ends and tokens without text come without their distribution; what is
        # reported is the model's own, before the bias
        found = complete(prompt, max_tokens=1, n_probs=1_000_000, logit_bias=[[letter, 1e6]])["logprobs"]["content"][0]
        answer["logp"].append({entry["id"]: entry["logprob"] for entry in found["top_logprobs"]})
    for text in question["texts"]:
        asked = {"content": text, "add_special": True, "parse_special": True}
        answer["ids"].append(post("/tokenize", asked)["tokens"])
    for ids in question["spelt"]:
        answer["texts"].append(post("/detokenize", {"tokens": ids})["content"])
    print("\n" + json.dumps(answer), flush=True)
    os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 1 else _main()
