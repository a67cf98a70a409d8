"""llama.cpp, always in a process of its own: it aborts on files that it cannot take.

Run as a program (`python -P llamacpp.py`) it is that process: one line of JSON in, lines of JSON out, and it ends when its
input does, so that it never outlives who asked.
"""

import base64
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

PACKAGE = "xllamacpp"
THREADS = max(1, (os.cpu_count() or 2) - 1)  # what a user's own machine can spare
OLDEST = (2026, 10)  # the first release of the package that was tried
INSTALL = "pip install 'potstill[device]'"
AHEAD = 3  # tokens of a draft, llama.cpp's own choice
SILENT_S = 600.0  # without a word from the server; a long prompt on a slow machine is silent too
Kv = Literal["f16", "f32"]
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy reaches this machine's own ports


class Refused(Exception):
    """llama.cpp did not take the file, or died; holds its last words."""


@dataclass(frozen=True)
class Opening:
    """How a file is opened.

    Attributes:
        context: positions, for all requests at once together; 0: the model's own.
        threads: of computing; one less than the cores keeps the machine answering.
        kv: type of the cache of keys and values. f32, without flash attention, is the exact one.
        parallel: requests that are computed at once; `context` is divided among them.
        draft: a smaller model of the same tokenizer, for speculative decoding; "": none.
        ahead: tokens that it writes before the model looks.
        host: where the server listens.
        port: of the server; 0: any that is free.
        alias: the model's name in the server's answers; "": the file's.
        keys: what a request must carry one of; none: anybody may ask.
        warmup: compute once before the first request.
        doubted: look for weights that are not finite, which takes about as long as hashing; of a file whose hash nobody knows.
    """

    context: int = 0
    threads: int = 1
    kv: Kv = "f32"
    parallel: int = 1
    draft: str = ""
    ahead: int = AHEAD
    host: str = "127.0.0.1"
    port: int = 0
    alias: str = ""
    keys: tuple[str, ...] = ()
    warmup: bool = False
    doubted: bool = False


EXACT = Opening()


@dataclass
class Answers:
    """What llama.cpp answered.

    Attributes:
        logp_V: for each prompt the next token's log-probabilities by id, float32; NaN where it named none.
        ids: for each text its token ids, special tokens read as such.
        texts: what each of the spelt token ids spell.
        written: for each of `continued` the greedy text, and why it ended: "stop" or "length".
        props: what the server says of the file: its chat template, its settings.
    """

    logp_V: "list[np.ndarray]" = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    written: list[tuple[str, str]] = field(default_factory=list)
    props: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Served:
    """A server that runs: OpenAI's API lies under `url`/v1, llama.cpp's own under `url`.

    Attributes:
        url: such as http://127.0.0.1:40001.
        pid: of its process.
        resting: bytes that the process held before it opened the file: Python and the library.
    """

    url: str
    pid: int
    resting: int
    _process: "subprocess.Popen[str]" = field(repr=False)
    _said: IO[bytes] = field(repr=False)

    def alive(self) -> bool:
        return self._process.poll() is None

    def last_words(self) -> str:
        """What it said last, for one who finds it dead."""
        return _last_words(self._said)

    def resident(self) -> int:
        """Bytes of memory that the process holds for the file now: weights that are mapped and read count."""
        import psutil

        return psutil.Process(self.pid).memory_info().rss - self.resting


@dataclass(frozen=True)
class Timing:
    """How long an answer took, by the clock of who asked.

    Attributes:
        first_s: until its first token came.
        tokens_per_s: of the tokens after the first.
    """

    first_s: float
    tokens_per_s: float


@contextmanager
def completing(server: Served, body: bytes) -> Iterator[Any]:
    """What llama.cpp's `/completion` answers, to be read while inside.

    Args:
        body: JSON, so that writing it is no part of what a caller times.

    Raises:
        Refused: the server died, or does not take the request.
    """
    try:
        with _asked(f"{server.url}/completion", body) as answer:
            yield answer
    except (OSError, http.client.HTTPException) as error:
        raise Refused(server.last_words() if not server.alive() else str(error)) from error


def _asked(url: str, body: bytes | None) -> Any:
    """The answer of a server on this machine, to be read and closed; TimeoutError where it is silent for too long."""
    return _DIRECT.open(urllib.request.Request(url, body, {"Content-Type": "application/json"}), timeout=SILENT_S)


def timed(server: Served, prompt: list[int], new_tokens: int) -> Timing:
    """Ask for a greedy answer of exactly so many tokens, nothing of the prompt remembered.

    Raises:
        Refused: the server died, or does not take the prompt.
    """
    body = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    data = json.dumps({**body, "stream": True}).encode()
    begun, first, last = time.perf_counter(), None, {}
    with completing(server, data) as answer:
        for line in answer:
            if line.startswith(b"data: "):
                first = first if first is not None else time.perf_counter()
                last = json.loads(line[len(b"data: ") :])
    ended = time.perf_counter()
    if first is None or last.get("tokens_predicted") != new_tokens:
        raise Refused(f"it answered {last.get('tokens_predicted', 0)} of {new_tokens} tokens")
    rest_s = max(ended - first, last["timings"]["predicted_ms"] / 1000)  # one who hears of the first token late sees none
    return Timing(first - begun, (new_tokens - 1) / rest_s)


def runtime_problem() -> str | None:
    """Why there is no llama.cpp to be asked, and the remedy; None where there is."""
    if find_spec(PACKAGE) is None:
        return f"llama.cpp is not here; {INSTALL}"
    found = runtime_version()
    parts = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if parts < OLDEST:
        return (
            f"{PACKAGE} {found} is older than {'.'.join(map(str, OLDEST))}; {INSTALL.replace('install', 'install --upgrade')}"
        )
    return None


def runtime_version() -> str:
    """The release of llama.cpp's package; "" where there is none."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return ""


def answers_of(
    file: Path,
    prompts: Sequence[list[int]] = (),
    texts: Sequence[str] = (),
    *,
    continued: Sequence[list[int]] = (),
    words: int = 40,
    spelt: Sequence[list[int]] = (),
    opening: Opening = EXACT,
    reuse: bool = False,
    heard: Callable[[], None] = lambda: None,
) -> Answers:
    """What llama.cpp makes of a file.

    Args:
        prompts: token ids; the next token's distribution after each is asked for.
        texts: whose token ids are asked for.
        continued: token ids after which a greedy text of at most `words` tokens is asked for.
        spelt: token ids whose text is asked for.
        reuse: a prompt that begins like the one before it computes only what is new.
        heard: called after each distribution.

    Raises:
        Refused: llama.cpp could not open the file, or died.
    """
    import numpy as np

    question = {"prompts": list(prompts), "texts": list(texts), "continued": list(continued), "words": words}
    question |= {"spelt": list(spelt), "reuse": reuse}
    answers, whole = Answers(), False
    with _process(file, opening, question) as (process, said):
        assert process.stdout is not None
        for line in process.stdout:
            part = json.loads(line)
            if "logp" in part:
                answers.logp_V.append(np.frombuffer(base64.b64decode(part["logp"]), "<f4"))
                heard()
            elif "written" in part:
                answers.written.append((part["written"], part["reason"]))
            elif "props" in part:
                answers.ids, answers.texts, answers.props = part["ids"], part["texts"], part["props"]
                whole = True
        if not whole:
            raise Refused(_last_words(said, process.wait()))
    return answers


@contextmanager
def served(
    file: Path,
    context: int = 0,
    threads: int = 1,
    kv: Kv = "f16",
    parallel: int = 1,
    draft: Path | None = None,
    ahead: int = AHEAD,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    alias: str = "",
    keys: Sequence[str] = (),
    warmup: bool = True,
    doubted: bool = False,
) -> Iterator[Served]:
    """llama.cpp's server for a file, while inside; arguments as in `Opening`.

    Raises:
        Refused: llama.cpp could not open the file, or the port is taken.
    """
    drafting = str(draft) if draft is not None else ""
    opening = Opening(context, threads, kv, parallel, drafting, ahead, host, port, alias, tuple(keys), warmup, doubted)
    with _process(file, opening, None) as (process, said):
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise Refused(_last_words(said, process.wait()))
        told = json.loads(line)
        yield Served(told["url"], process.pid, told["resting"], process, said)


@contextmanager
def _process(
    file: Path, opening: Opening, question: dict[str, Any] | None
) -> "Iterator[tuple[subprocess.Popen[str], IO[bytes]]]":
    """The process that holds llama.cpp, and what it says on its error output; it is gone afterwards."""
    path = os.pathsep.join(part for part in sys.path if part)
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for who asked, who then closes the input
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            asked = {"file": str(file), "opening": asdict(opening), "question": question}
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            yield process, said
        finally:
            process.stdin.close()
            process.stdout.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _last_words(said: IO[bytes], status: int | None = None) -> str:
    """The errors among what llama.cpp said, else its last line, in one line."""
    size = said.seek(0, os.SEEK_END)
    said.seek(max(0, size - 20_000))
    stamped = said.read().decode(errors="replace").splitlines()
    lines = [line for line in (re.sub(r"^[\d.]+ [A-Z] +", "", line).strip() for line in stamped) if line]
    errors = [
        line for line in lines if any(word in line.lower() for word in ("error", "failed", "assert", "abort", "couldn't"))
    ]
    found = list(dict.fromkeys(errors))[:3] or lines[-1:]
    died = f"it died by signal {-status}" if status is not None and status < 0 else ""
    return "; ".join(filter(None, [*found, died])) or "it said nothing"


# What follows runs in the process of llama.cpp's own.


def _server(file: str, opening: Opening) -> Any:
    xllamacpp: Any = import_module(PACKAGE)  # it ships no types
    types = {"f16": xllamacpp.ggml_type.GGML_TYPE_F16, "f32": xllamacpp.ggml_type.GGML_TYPE_F32}
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = file, opening.context, opening.parallel
    params.cache_type_k = params.cache_type_v = types[opening.kv]
    if opening.kv == "f32":
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = opening.threads
    params.warmup, params.fit_params, params.n_gpu_layers, params.verbosity = opening.warmup, False, 0, 3
    params.check_tensors = opening.doubted
    params.hostnames, params.port, params.api_keys = [opening.host], opening.port, list(opening.keys)
    params.ui, params.endpoint_slots = False, False
    params.cache_ram_mib = 0  # else it keeps earlier prompts in up to 8 GiB, which looks like a leak
    if opening.alias:
        params.model_alias = {opening.alias}
    if opening.draft:
        drafter = params.speculative.draft
        drafter.mparams.path, drafter.n_gpu_layers, drafter.n_max = opening.draft, 0, opening.ahead
        drafter.cpuparams.n_threads = drafter.cpuparams_batch.n_threads = opening.threads
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
    return xllamacpp.Server(params)


def _answer(server: Any, question: dict[str, Any], say: Callable[..., None]) -> None:
    def post(path: str, body: Any = None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        with _asked(server.listening_address + path, data) as answer:
            return json.loads(answer.read())

    def complete(prompt: list[int], **more: Any) -> Any:
        asked = {"prompt": prompt, "temperature": 0, "cache_prompt": question["reuse"], **more}
        return server.handle_completions(asked)["choices"][0]

    letter = post("/tokenize", {"content": "a"})["tokens"][0]
    for prompt in question["continued"]:
        found = complete(prompt, max_tokens=question["words"])
        say(written=found["text"], reason=found["finish_reason"])
    for prompt in question["prompts"]:
        # a printable token is forced, because ends and tokens without text come without their distribution; what is
        # reported is the model's own, before the bias
        found = complete(prompt, max_tokens=1, n_probs=1_000_000, logit_bias=[[letter, 1e6]])["logprobs"]["content"][0]
        told = found["top_logprobs"]
        logp_V = array("f", [float("nan")]) * (1 + max(entry["id"] for entry in told))
        for entry in told:
            if entry["logprob"] is not None:  # JSON has no NaN
                logp_V[entry["id"]] = entry["logprob"]
        say(logp=base64.b64encode(logp_V.tobytes()).decode())
    asked = [{"content": text, "add_special": True, "parse_special": True} for text in question["texts"]]
    ids = [post("/tokenize", body)["tokens"] for body in asked]
    texts = [post("/detokenize", {"tokens": spelt})["content"] for spelt in question["spelt"]]
    say(ids=ids, texts=texts, props=post("/props"))


def _main() -> None:
    import threading

    import psutil

    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp may print what it likes
    asked = json.loads(sys.stdin.readline())

    def leave() -> None:
        sys.stdin.read()
        os._exit(0)

    def say(**part: Any) -> None:
        print(json.dumps(part), file=lines, flush=True)

    threading.Thread(target=leave, daemon=True).start()
    import_module(PACKAGE)
    resting = psutil.Process().memory_info().rss
    server = _server(asked["file"], Opening(**asked["opening"]))
    if asked["question"] is None:
        say(url=server.listening_address, resting=resting)
        threading.Event().wait()
    _answer(server, asked["question"], say)
    lines.close()
    os._exit(0)


if __name__ == "__main__":
    _main()
