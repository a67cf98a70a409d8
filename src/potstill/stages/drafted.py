"""Exported files of a model and of its draft model, measured together in llama.cpp."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import Field

from potstill.core.artifact import Artifact
from potstill.core.component import Settings
from potstill.core.errors import UserError
from potstill.edges.llamacpp import Refused, served
from potstill.edges.llamacpp_drafts import NO_DRAFTS, Written, check_draft, written
from potstill.edges.models import config_of, load_tokenizer, positions_of
from potstill.edges.vocabulary import other_tokens
from potstill.stages.lineage import behind
from potstill.stages.outlook import Outlook
from potstill.stages.passages import Passages, passages_for
from potstill.stages.refs import ExportRef
from potstill.stages.runtimes import type_of

PROMPTS = 4  # at most; passages have no more rows
SPARE = 8  # positions that the runtime may want beside prompt, answer and draft


class Draft(Settings):
    """Two exports whose files are measured together."""

    export: ExportRef = Field(description="of the model that answers; each of its GGUF files is measured")
    draft: ExportRef = Field(description="of a smaller model with the same tokenizer; each of its GGUF files writes ahead")
    ahead: int = Field(default=3, ge=1, le=64, description="tokens that it writes before the model looks")

    def problem(self, outlook: Outlook) -> str:
        """Why the two cannot go together, as far as it is known before anything runs; "" where nothing is."""
        if self.export.scheme == self.draft.scheme == "path":
            return _apart(Path(self.export.target).expanduser(), Path(self.draft.target).expanduser())
        exports = [outlook.stage(ref) for ref in (self.export, self.draft)]
        try:
            models = [export.model for export in exports if export is not None and hasattr(export, "model")]
            found = [outlook.model(model) for model in models]
            tokenizers = [one.tokenizer() for one in found if one is not None]
        except UserError:  # said at its own stage
            return ""
        if len(tokenizers) < 2 or None in tokenizers:
            return ""
        ours, theirs = tokenizers
        apart = other_tokens(ours, theirs, str(self.export), str(self.draft))
        return f"{apart}; a draft model needs the tokenizer of the model that it drafts for" if apart else ""


def _apart(export: Path, draft: Path) -> str:
    """Why the first file of one folder cannot go with the first of another; "" where it can, or there is none."""
    files = [next(iter(sorted(folder.glob("*.gguf"))), None) for folder in (export, draft)]
    if files[0] is None or files[1] is None:
        return ""
    try:
        check_draft(files[0], files[1])
    except UserError as error:
        return str(error)
    return ""


@dataclass(frozen=True, eq=False)
class Exported:
    """A GGUF file of an export, or the folder of its page."""

    ref: str
    artifact: Artifact
    path: Path

    @property
    def model(self) -> str:
        return str(self.artifact.stage["model"])


@dataclass
class Together:
    """Two files, and what was measured of them so far.

    Attributes:
        alone, drafted: the answers to each prompt of each turn.
    """

    file: Exported
    draft: Exported
    ahead: int
    threads: int
    prompts: list[list[int]]
    of: str
    new_tokens: int
    alone: list[list[Written]] = field(default_factory=list)
    drafted: list[list[Written]] = field(default_factory=list)

    def measure(self) -> None:
        """One turn: the file alone, then with its draft, each in a process of its own.

        Raises:
            UserError: llama.cpp does not take them.
        """
        room = max(map(len, self.prompts)) + self.new_tokens + self.ahead + SPARE
        for answers, draft in ((self.alone, None), (self.drafted, self.draft.path)):
            try:
                with served(self.file.path, room, self.threads, "f16", draft=draft, ahead=self.ahead) as server:
                    written(server, self.prompts[0], 2)  # both begin warm
                    answers.append([written(server, prompt, self.new_tokens) for prompt in self.prompts])
            except Refused as error:
                with_draft = f" with the draft {draft}" if draft is not None else ""
                raise UserError(f"{self.file.path}{with_draft}: llama.cpp gave no answer: {error}") from error

    def figures(self) -> dict[str, Any]:
        """Tokens per second over all prompts together; of the turns the median, and all of them."""
        alone, drafted = ([_rate(turn) for turn in turns] for turns in (self.alone, self.drafted))
        ratios = [one / other for one, other in zip(drafted, alone, strict=True)]
        drafts = reduce(add, (one.drafts for turn in self.drafted for one in turn), NO_DRAFTS)
        pairs = list(zip(self.alone[0], self.drafted[0], strict=True))
        return {
            "model": self.file.model,
            "export": self.file.ref,
            "file": self.file.path.name,
            "type": type_of(self.file.path),
            "draft_model": self.draft.model,
            "draft_export": self.draft.ref,
            "draft_file": self.draft.path.name,
            "draft_type": type_of(self.draft.path),
            "ahead": self.ahead,
            "threads": self.threads,
            "prompts": len(self.prompts),
            "of": self.of,
            "alone_tokens_per_s": median(alone),
            "tokens_per_s": median(drafted),
            "speed_up": median(ratios),
            "all_alone_tokens_per_s": alone,
            "all_tokens_per_s": drafted,
            "all_speed_ups": ratios,
            "drafted": drafts.drafted,
            "accepted": drafts.accepted,
            "acceptance_percent": drafts.acceptance,
            "same_texts": sum(one.text == other.text for one, other in pairs),
        }


def together(
    drafts: Sequence[Draft], files_of: Callable[[ExportRef], list[Exported]], threads: Sequence[int], new_tokens: int
) -> Iterator[Together]:
    """Each pair of files, with the prompts that it is asked.

    Raises:
        UserError: their token ids mean something else, or one of them cannot be read.
    """
    for pair in drafts:
        for file in files_of(pair.export):
            for draft in files_of(pair.draft):
                check_draft(file.path, draft.path)
                passages = _passages(file, draft, new_tokens + pair.ahead + SPARE)
                prompts = [prompt for prompt, _ in (passages.own or passages.built_in)[:PROMPTS]]
                of = passages.of.partition(" and ")[0] if passages.own else f"{len(prompts)} built-in texts"
                for number in threads:
                    yield Together(file, draft, pair.ahead, number, prompts, of, new_tokens)


def _passages(file: Exported, draft: Exported, answer: int) -> Passages:
    """Rows that the draft model was trained for, else those of the model; built-in texts where neither was made here."""
    positions = [positions_of(config_of(f"path:{one.path}")) for one in (file, draft)]
    room = min((known for known in positions if known is not None), default=None)
    if room is not None and room <= answer:
        raise UserError(f"{file.path} with the draft {draft.path}: {room} positions are no room for answers of {answer} tokens")
    made = next((model for one in (draft, file) if (model := behind(one.artifact, one.model)) is not None), None)
    tokenizer = load_tokenizer(f"path:{made.folder}" if made is not None else f"path:{file.path}")
    found = passages_for(made, tokenizer, room)
    if room is None:
        return found
    own, built_in = ([(prompt[: room - answer], said) for prompt, said in pairs] for pairs in (found.own, found.built_in))
    return Passages(own, built_in, found.of)


def _rate(turn: Sequence[Written]) -> float:
    return sum(one.tokens for one in turn) / sum(one.seconds for one in turn)
