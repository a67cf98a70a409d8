"""The commands that run exported files in people's programs: llama.cpp, Ollama, LM Studio."""

import shlex
from collections.abc import Iterator, Sequence

from potstill.core.numbers import size
from potstill.report.ship import ShippedFile

MODELFILE = "Modelfile"


def tools(ggufs: Sequence[ShippedFile], *, modelfile: bool) -> Iterator[str]:
    """Markdown: a command for each program, to be typed in the folder that holds the files.

    Args:
        ggufs: the smallest first; the others are named for llama.cpp alone.
        modelfile: whether a `Modelfile` for Ollama lies beside them.
    """
    first = shlex.quote(ggufs[0].name)
    yield from ("With llama.cpp:", "", "```sh", *(f"{file.command}  # {size(file.bytes)}" for file in ggufs))
    yield from (f"llama-server -m {first} --jinja  # OpenAI's API at http://127.0.0.1:8080/v1, and a page", "```", "")
    if modelfile:
        yield from ("With Ollama:", "", "```sh", f"ollama create NAME -f {MODELFILE}", "ollama run NAME", "```", "")
    yield from ("With LM Studio, then choose it in the program:", "", "```sh", f"lms import {first}", "```", "")
    yield from ("llama.cpp and LM Studio read the chat template from the file.", "")


def how_to_run(ggufs: Sequence[ShippedFile], *, modelfile: bool) -> str:
    """A README.md for files that no study measured."""
    return "\n".join(["# How to run", "", *tools(ggufs, modelfile=modelfile)])
