"""Exported files measured in llama.cpp, and exported pages in a browser, as they would run on a device."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count, product
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

from pydantic import Field

from potstill.core.artifact import Artifact, Makes, write_json
from potstill.core.errors import Problem, UserError
from potstill.core.numbers import number, size
from potstill.data.tricky import CHATS
from potstill.edges.browser import BrowserFailed, PageTiming, browser_found, has_sandbox, measure_page
from potstill.edges.llamacpp import Refused, answers_of, runtime_problem, runtime_version, served, timed
from potstill.edges.machine import machine_facts, resting_memory
from potstill.edges.models import config_of, positions_of
from potstill.exporters import web
from potstill.stages.base import Context, Stage
from potstill.stages.drafted import PROMPTS, SPARE, Draft, Exported, together
from potstill.stages.lineage import made_here
from potstill.stages.outlook import Cost, Outlook
from potstill.stages.refs import ExportRef
from potstill.stages.runtimes import type_of

MEASURED = "device.json"
_PAGE = f"{web.FOLDER}/model.bin"


class Device(Stage, kind="device"):
    """Measure latency and memory of exported GGUF files in llama.cpp, and the speed of exported pages, on this machine.

    Each file is opened in a process of its own, all files in turn before any is opened again (A B A B), so that what else the
    machine does meets all of them. Latency: seconds to the first token and tokens per second after it, for each number of
    threads and length of the prompt, by the clock of who asks, and never faster than by llama.cpp's own. Memory: what the
    process holds beyond the library itself, and the file; of several numbers of threads the largest. A web export is opened in
    a headless browser, each time with an empty profile: seconds until the model is ready, and latency by the page's own
    clock. The median of `repeats` is shown, all of them are kept.
    """

    makes: ClassVar[Makes] = "measurement"
    gathers: ClassVar[bool] = True
    version: ClassVar[int] = 2  # 2: pages in a browser, draft models, and a rate that is never above llama.cpp's own

    exports: tuple[ExportRef, ...] = Field(min_length=1, description="exports whose GGUF files and pages are measured")
    threads: tuple[int, ...] = Field(default=(1,), min_length=1, description="numbers of threads, each tried")
    contexts: tuple[int, ...] = Field(
        default=(128, 512), min_length=1, description="lengths of the prompt in tokens, each tried"
    )
    new_tokens: int = Field(default=64, ge=2, description="tokens of an answer")
    repeats: int = Field(default=3, ge=1, description="how often each file is opened and asked; the median counts")
    browser: str = Field(
        default="auto",
        description="what opens pages: a program, such as 'chromium'; auto: the first that is found, but for root, whose "
        "browser has no sandbox, no page of a `path:`; none: nothing does",
    )
    drafts: tuple[Draft, ...] = Field(
        default=(), description="exports whose files are also measured with those of a smaller model as draft model"
    )

    def problems(self, outlook: Outlook) -> Iterator[Problem]:
        if (trouble := runtime_problem()) is not None and not self._pages_alone(outlook):
            yield Problem("kind", f"measures in llama.cpp, and {trouble}", "'device'")
        if self._named and browser_found(self.browser) is None:
            why = "is no program on PATH; install it, or leave it to 'auto', which only says that there is none"
            yield Problem("browser", f"'{self.browser}' {why}", repr(self.browser))
        for field in ("threads", "contexts"):
            if any(value < 1 for value in getattr(self, field)):
                yield Problem(field, "must be numbers from 1 on", str(list(getattr(self, field))))
        for place, ref in enumerate(self.exports):
            yield from _nothing_in(outlook, f"exports[{place}]", ref, page=True)
            yield from self._too_long(outlook, ref)
        for place, pair in enumerate(self.drafts):
            if apart := pair.problem(outlook):
                yield Problem(f"drafts[{place}]", apart, str(pair.draft))
            for field, ref in (("export", pair.export), ("draft", pair.draft)):
                yield from _nothing_in(outlook, f"drafts[{place}].{field}", ref, page=False)
                yield from self._no_room(outlook, ref, pair.ahead)

    @property
    def _named(self) -> bool:
        """Whether somebody asked for this very browser, so that its absence is an error."""
        return self.browser not in ("auto", "none")

    def _pages_alone(self, outlook: Outlook) -> bool:
        """Whether nothing is for llama.cpp, as far as the recipe tells."""
        held = [_held_by(outlook, ref) for ref in self.exports]
        return not self.drafts and all(names and not _has_gguf(names) for names in held)

    def _too_long(self, outlook: Outlook, ref: ExportRef) -> Iterator[Problem]:
        """A prompt and its answer that a model has no positions for: they would be refused after all training."""
        limit, model = _positions(outlook, ref)
        longest = max(self.contexts, default=0) + self.new_tokens + SPARE
        if limit is not None and longest > limit:
            room = limit - self.new_tokens - SPARE
            yield Problem(
                "contexts",
                f"a prompt of {max(self.contexts)} and {self.new_tokens} new tokens need {longest} positions, and "
                f"{model} has {limit}; " + (f"use at most {room}" if room > 0 else "lower new_tokens"),
                str(list(self.contexts)),
            )

    def _no_room(self, outlook: Outlook, ref: ExportRef, ahead: int) -> Iterator[Problem]:
        """An answer and its draft that leave no position for a prompt, which is cut to what they leave."""
        limit, model = _positions(outlook, ref)
        if limit is not None and limit <= self.new_tokens + ahead + SPARE:
            room = limit - ahead - SPARE - 1
            yield Problem(
                "new_tokens",
                f"an answer of {self.new_tokens} and a draft of {ahead} tokens leave no room for a prompt, because {model} has "
                f"{limit} positions; " + (f"use at most {room}" if room > 1 else "use a model with more of them"),
                str(self.new_tokens),
            )

    def cost(self, outlook: Outlook) -> Cost:
        asked = sum(context + self.new_tokens for context in self.contexts)
        asked = len(self.exports) * asked + 2 * len(self.drafts) * PROMPTS * 2 * self.new_tokens  # prompts about as long
        return Cost(
            tokens=self.repeats * len(self.threads) * asked,
            memory_bytes=round(resting_memory()),
            note="what llama.cpp takes is measured, not foreseen",
        )

    def closing(self, summary: dict[str, Any]) -> str:
        return "; ".join([*map(in_words, summary["files"]), *map(page_in_words, summary["pages"])])

    def run(self, context: Context) -> dict[str, Any]:
        work, (files, pages) = context.work, self._files(context)
        pairs = list(together(self.drafts, lambda ref: _exported(context, ref), self.threads, self.new_tokens))
        prompts = {file: _prompts(file, self.contexts) for file in files}
        found = {file: _Measured() for file in files}
        timed_pages = [_TimedPage(page, self.new_tokens, self.browser) for page in pages]
        openings = [(file, threads) for threads in self.threads for file in files]
        total, done = self.repeats * (len(openings) + len(pages)), count()
        for _ in range(self.repeats):
            for file, threads in openings:
                work.progress.update(next(done), total, "opening", file=file.path.name, threads=str(threads))
                self._measure(file, threads, prompts[file], found[file])
            for page in timed_pages:
                work.progress.update(next(done), total, "opening", file=f"{page.page.path.name}/")
                page.measure(must=self._named)
        work.progress.update(total, total, "opening")
        for turn, (_, pair) in enumerate(product(range(self.repeats), pairs)):
            work.progress.update(turn, self.repeats * len(pairs), "draft", file=pair.file.path.name, draft=pair.draft.path.name)
            pair.measure()
        made = {
            "runtime": f"xllamacpp {runtime_version()}",
            "machine": machine_facts()["machine"] | {"processor": processor()},
            "new_tokens": self.new_tokens,
            "repeats": self.repeats,
            "files": [found[file].figures(file) for file in files],
            "pages": [page.figures() for page in timed_pages],
            "drafts": [pair.figures() for pair in pairs],
        }
        write_json(work.folder / MEASURED, made)
        return made

    def _files(self, context: Context) -> tuple[list[Exported], list[Exported]]:
        """GGUF files, and folders of pages."""
        files, pages = [], []
        for ref in self.exports:
            artifact = context.artifacts(ref)[0]
            own, page = _ggufs(ref, artifact), _PAGE in artifact.summary["files"]
            if not own and not page:
                raise UserError(f"{context.work.name}: {ref} holds no GGUF file and no page; add 'gguf' to its formats")
            files += own
            pages += [Exported(str(ref), artifact, artifact.folder / web.FOLDER)] if page else []
        if files and (trouble := runtime_problem()) is not None:  # of an export whose formats nobody knew before
            raise UserError(f"{context.work.name}: measures in llama.cpp, and {trouble}")
        return files, pages

    def _measure(self, file: Exported, threads: int, prompts: Sequence[list[int]], found: "_Measured") -> None:
        """One opening of one file."""
        room = max(map(len, prompts)) + self.new_tokens + SPARE
        try:
            with served(file.path, context=room, threads=threads, kv="f16") as server:
                for prompt in prompts:
                    timing = timed(server, prompt, self.new_tokens)
                    found.latency.setdefault((threads, len(prompt)), []).append((timing.first_s, timing.tokens_per_s))
                found.resident.setdefault(threads, []).append(server.resident())
        except Refused as error:
            raise UserError(f"{file.path}: llama.cpp gave no answer: {error}") from error


class _Measured:
    """What was measured of one file so far."""

    def __init__(self) -> None:
        self.latency: dict[tuple[int, int], list[tuple[float, float]]] = {}
        self.resident: dict[int, list[int]] = {}  # by threads

    def figures(self, file: Exported) -> dict[str, Any]:
        latency = [
            {
                "threads": threads,
                "context": context,
                "first_s": median(first for first, _ in each),
                "tokens_per_s": median(rate for _, rate in each),
                "all_first_s": [first for first, _ in each],
                "all_tokens_per_s": [rate for _, rate in each],
            }
            for (threads, context), each in self.latency.items()
        ]
        return {
            "model": file.model,
            "export": file.ref,
            "file": file.path.name,
            "type": type_of(file.path),
            "latency": latency,
            "memory": {
                "file_bytes": file.path.stat().st_size,
                "resident_bytes": round(max(median(each) for each in self.resident.values())),
            },
            "all_resident_bytes": {str(threads): each for threads, each in self.resident.items()},
        }


class _TimedPage:
    """What was measured of one page so far."""

    def __init__(self, page: Exported, tokens: int, browser: str) -> None:
        self.page, self._tokens = page, tokens
        self._timings: list[PageTiming] = []
        self._program, self._why = None, "browser = 'none'"
        if browser == "auto" and page.ref.startswith("path:") and not has_sandbox():  # somebody else may have made it
            self._why = "a browser has no sandbox as root; set browser = 'chromium' where you trust the page"
        elif browser != "none":
            self._program = browser_found("" if browser == "auto" else browser)
            self._why = "no browser is here; install chromium"

    def measure(self, *, must: bool) -> None:
        """One opening; a page that does not answer is not opened again.

        Args:
            must: raise where it does not answer.
        """
        if self._program is None:
            return
        try:
            self._timings.append(measure_page(self.page.path, self._program, self._tokens))
        except BrowserFailed as error:
            if must:
                raise UserError(f"{self.page.path}: {self._program} did not measure the page: {error}") from error
            self._program, self._timings = None, []
            self._why = str(error)

    def figures(self) -> dict[str, Any]:
        files = [file for file in self.page.path.iterdir() if file.is_file()]
        told = {"model": self.page.model, "export": self.page.ref, "file": f"{self.page.path.name}/"}
        told |= {"type": type_of(self.page.path / "model.bin"), "folder_bytes": sum(file.stat().st_size for file in files)}
        if not self._timings:
            return {**told, "why": self._why}
        each = {name: [getattr(timing, name) for timing in self._timings] for name in ("load_s", "first_s", "tokens_per_s")}
        last = self._timings[-1]
        figures = {name: median(values) for name, values in each.items()}
        every = {f"all_{name}": values for name, values in each.items()}
        return {**told, "browser": last.browser, "tokens": last.tokens, "context": last.prompt, **figures, **every}


def _held_by(outlook: Outlook, ref: ExportRef) -> list[str] | None:
    """Files of weights that an export holds or will hold; None: nobody knows yet."""
    if ref.scheme == "stage":
        formats = getattr(outlook.stage(ref), "formats", None)
        return None if formats is None else [name for one in formats for name in one.holds("float32", quantised=0)]
    try:
        found = made_here(str(ref))
    except UserError:  # said where its hash is taken
        return None
    return None if found is None else list(found.summary.get("files", ()))


def _has_gguf(names: Iterable[str]) -> bool:
    return any(name.endswith(".gguf") for name in names)


def _nothing_in(outlook: Outlook, place: str, ref: ExportRef, *, page: bool) -> Iterator[Problem]:
    """An export without a file that can be measured.

    Args:
        page: whether a page will do.
    """
    names = _held_by(outlook, ref)
    if names is not None and not _has_gguf(names) and not (page and _PAGE in names):
        what = "no GGUF file and no page" if page else "no GGUF file"
        yield Problem(place, f"{ref} writes {what}; add 'gguf' to its formats", str(ref))


def _positions(outlook: Outlook, ref: ExportRef) -> tuple[int | None, str]:
    """Positions of the model of an export's GGUF files, and its name; None: not known, or it has no such files."""
    names = _held_by(outlook, ref)
    if names is not None and not _has_gguf(names):
        return None, str(ref)
    try:
        if ref.scheme == "path":
            files = sorted(Path(ref.target).expanduser().glob("*.gguf"))
            limits = (positions_of(config_of(f"path:{file}")) for file in files)
            return min((limit for limit in limits if limit is not None), default=None), str(ref)
        model = getattr(outlook.stage(ref), "model", None)
        found = outlook.model(model) if model is not None else None
    except UserError:  # said at its own stage
        return None, str(ref)
    return (positions_of(found.config) if found is not None else None), str(model)


def _ggufs(ref: ExportRef, artifact: Artifact) -> list[Exported]:
    return [
        Exported(str(ref), artifact, artifact.folder / name) for name in artifact.summary["files"] if name.endswith(".gguf")
    ]


def _exported(context: Context, ref: ExportRef) -> list[Exported]:
    found = _ggufs(ref, context.artifacts(ref)[0])
    if not found:
        raise UserError(f"{context.work.name}: {ref} holds no GGUF file; add 'gguf' to its formats")
    return found


def _prompts(file: Exported, contexts: Sequence[int]) -> list[list[int]]:
    """Built-in text in the file's own tokens, cut to each length."""
    text = "\n\n".join(part for pair in CHATS for part in pair) + "\n\n"
    try:
        (ids,) = answers_of(file.path, texts=[text]).ids
    except Refused as error:
        raise UserError(f"{file.path}: llama.cpp does not open it: {error}") from error
    return [(ids * (1 + context // len(ids)))[:context] for context in dict.fromkeys(contexts)]


def processor() -> str:
    """The processor's name, as the system tells it."""
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def in_words(one: dict[str, Any]) -> str:
    """`model-q4_0.gguf 92 MB, resident 150 MB, 41.2 tokens/s`, of its fastest case."""
    best = max(one["latency"], key=lambda case: case["tokens_per_s"])
    memory = one["memory"]
    held = f"{size(memory['file_bytes'])}, resident {size(memory['resident_bytes'])}"
    return f"{one['file']} {held}, {number(best['tokens_per_s'], 1)} tokens/s"


def page_in_words(one: dict[str, Any]) -> str:
    """`web/ 129 MB, 9.8 tokens/s in Chrome 150.0.1`, or why it was not measured."""
    held = f"{one['file']} {size(one['folder_bytes'])}"
    if "why" in one:
        return f"{held}, not measured: {one['why']}"
    return f"{held}, {number(one['tokens_per_s'], 1)} tokens/s in {one['browser']}"
