"""The commands that run exported files in people's programs: llama.cpp, Ollama, LM Studio, a browser."""

import shlex
from collections.abc import Iterator, Mapping

from potstill.core.numbers import size
from potstill.report.ship import shipped_files

MODELFILE = "Modelfile"
WEB = "web"  # the folder of a page that runs a model


def tools(files: Mapping[str, int]) -> Iterator[str]:
    """Markdown: a command for each program, to be typed in the folder that holds the files.

    Args:
        files: their sizes in bytes, by name in the folder. The smallest GGUF file is everybody's, the others llama.cpp's.
    """
    ggufs = [file for file in shipped_files(files) if file.name.endswith(".gguf")]
    if ggufs:
        first = shlex.quote(ggufs[0].name)
        yield from ("With llama.cpp:", "", "```sh", *(f"{file.command}  # {size(file.bytes)}" for file in ggufs))
        yield from (f"llama-server -m {first} --jinja  # OpenAI's API at http://127.0.0.1:8080/v1, and a page", "```", "")
        if MODELFILE in files:
            yield from ("With Ollama:", "", "```sh", f"ollama create NAME -f {MODELFILE}", "ollama run NAME", "```", "")
        yield from ("With LM Studio, then choose it in the program:", "", "```sh", f"lms import {first}", "```", "")
        yield from ("llama.cpp and LM Studio read the chat template from the file.", "")
    if f"{WEB}/index.html" in files:
        held = size(sum(bytes for name, bytes in files.items() if name.startswith(f"{WEB}/")))
        yield from ("In a browser, at http://127.0.0.1:8000; any other server of files does as well:", "", "```sh")
        yield from (f"python -m http.server --bind 127.0.0.1 -d {WEB}  # {held}", "```", "")


def how_to_run(files: Mapping[str, int]) -> str:
    """A README.md for files that no study measured; empty where no program of people's takes them."""
    lines = [*tools(files)]
    return "\n".join(["# How to run", "", *lines]) if lines else ""
