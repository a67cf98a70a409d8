"""The teacher's side of distillation: where its signal is kept, and by what it is recognised."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from potstill.core.artifact import Artifact, fingerprint
from potstill.core.errors import UserError
from potstill.data.prompts import Prompts
from potstill.data.store import TokenStore
from potstill.edges import ranks
from potstill.edges.models import Model, content_id, load_head, load_model
from potstill.losses.targets import Signal
from potstill.quant.int8 import int8_body
from potstill.sources import Source
from potstill.teachers.cache import ABOUT, RowCache, keys_of
from potstill.teachers.signals import Cached, Form, HiddenForm, Live, TopKForm
from potstill.train.team import shard_frozen

SHARED = "teacher-cache"  # a run's own caches, in its folder
Kept = Literal["hidden", "topk"]
TeacherPrecision = Literal["auto", "fp32", "bf16", "int8"]


class Teacher:
    """A teacher that is loaded only when it is needed.

    Args:
        where: `path:…` or `hf:…`.
        precision: of its weights.
        bf16: whether it computes in bfloat16, as its student does.
        vocab: leading token ids shared with the student.
        shard: whether each of several processes holds a part of it.
    """

    def __init__(
        self,
        where: str,
        precision: TeacherPrecision,
        bf16: bool,
        vocab: int,
        say: Callable[[str], None],
        shard: bool = False,
    ) -> None:
        self.precision: TeacherPrecision = precision
        self.where, self.bf16, self.vocab, self.say, self.shard = where, bf16, vocab, say, shard
        self._live: Live | None = None

    def load(self) -> Model:
        if self._live is not None:
            return self._live.teacher
        model = load_teacher(self.where, self.precision, self.bf16)
        return shard_frozen(model) if self.shard else model

    def signal(self, cache: RowCache, form: Form, missing: Iterable[bytes]) -> Cached:
        """What it says, computed where the cache lacks it; a sharded teacher reads when any process lacks a row."""
        needed = (lambda lacking: any(ranks.gathered(lacking))) if self.shard else (lambda lacking: lacking)
        return Cached(cache, form, self.load, missing, needed)

    def live(self) -> Live:
        """Beside the student from now on; whatever else needs the teacher's weights takes these."""
        self._live = Live(self.load())
        return self._live

    def form(self, kept: Kept, top_k: int, temperature: float) -> Form:
        """How its hidden states are kept.

        Raises:
            UserError: `top_k` is more than the vocabulary.
        """
        if kept == "topk" and top_k > self.vocab:
            raise UserError(f"top_k = {top_k} is more than the {self.vocab:,} tokens of the vocabulary; lower it")
        head, form = load_head(self.where, held_in(self.precision, self.bf16))
        return HiddenForm(head, form) if kept == "hidden" else TopKForm(head, form, top_k, temperature, self.vocab)

    def identity(self, kept: Kept, top_k: int, temperature: float) -> dict[str, Any]:
        """All that decides what is kept of a row."""
        more = {"k": top_k, "temperature": temperature, "vocabulary": self.vocab} if kept == "topk" else {}
        held = str(held_in(self.precision, self.bf16)).removeprefix("torch.")
        precision = f"{'int8 of ' if self.precision == 'int8' else ''}{held}{', bf16 products' if self.bf16 else ''}"
        return {"teacher": content_id(self.where), "precision": precision, "signal": kept, **more}


def about(data: Source, prompts: Prompts) -> dict[str, Any]:
    """What rows were made from, for messages: where two differ, so do the rows' tokens."""
    parts = {"data": data.spec(), "prompts": prompts.model_dump(mode="json")}
    return {f"{part}.{name}": value for part, fields in parts.items() for name, value in fields.items()}


def longest(store: TokenStore) -> int:
    """Tokens of a store's longest row."""
    return max(map(store.length, range(len(store))))


def kept_signal(
    teacher: Teacher, kept: Kept, top_k: int, temperature: float, folder: Path, rows: dict[str, Any], store: TokenStore
) -> Cached:
    """The teacher's signal of a store's rows, kept under a folder that may hold those of other teachers too."""
    form = teacher.form(kept, top_k, temperature)
    identity = teacher.identity(kept, top_k, temperature)
    place = folder / fingerprint(identity)[:16]
    ranks.on_first(lambda: RowCache(place, identity, form.width, about=rows, mend=True).close())
    cache = RowCache(place, identity, form.width, say=teacher.say, about=rows, mend=True)
    return teacher.signal(cache, form, cache.missing(keys_of(store)))


def built_signal(artifact: Artifact, teacher: Teacher, temperature: float, rows: dict[str, Any], store: TokenStore) -> Cached:
    """The signal that a cache stage kept; of its rows, damaged ones are computed again.

    Raises:
        UserError: it is another teacher's, was made at another temperature, or lacks rows; says which.
    """
    kept, top_k = artifact.stage["signal"], artifact.stage["top_k"]
    form = teacher.form(kept, top_k, temperature)
    found = [path.parent for path in (artifact.folder / SHARED).glob(f"*/{ABOUT}")]
    if len(found) != 1:
        raise UserError(f"the cache '{artifact.name}' has lost its {ABOUT}; delete {artifact.folder} and run again")
    try:
        cache = RowCache(found[0], teacher.identity(kept, top_k, temperature), form.width, say=teacher.say)
    except UserError as error:
        raise UserError(f"the cache '{artifact.name}' does not fit: {error}; build another one, or leave out `cache`") from None
    missing = list(cache.missing(keys_of(store)))
    if len(missing) > cache.lost:
        there = artifact.summary["rows_of"]
        other = [
            f"{name} is {there.get(name)!r} there and {here!r} here" for name, here in rows.items() if there.get(name) != here
        ]
        raise UserError(
            f"the cache '{artifact.name}' lacks {len(missing):,} of {len(store):,} rows "
            f"({'; '.join(other) or 'the data gave other rows'}); build it with the same data, prompts and tokenizer, "
            "or leave out `cache`"
        )
    return teacher.signal(cache, form, missing)


def facts_of(signal: Signal) -> dict[str, Any]:
    """For a summary: rows counted over all processes."""
    gathered = ranks.gathered(signal.facts())
    return {name: sum(t[name] for t in gathered) if name.startswith("rows_") else value for name, value in gathered[0].items()}


def held_in(precision: TeacherPrecision, bf16: bool) -> Any:
    """The dtype of a teacher's weights; `bf16`: what auto means, and what int8 is rounded from."""
    import torch

    return torch.bfloat16 if precision == "bf16" or (precision != "fp32" and bf16) else torch.float32


def load_teacher(where: str, precision: TeacherPrecision, bf16: bool) -> Model:
    """A frozen teacher; see `held_in`."""
    model = frozen(load_model(where, held_in(precision, bf16)))
    return int8_body(model) if precision == "int8" else model


def frozen(model: Model) -> Model:
    """A teacher: no gradient, no dropout."""
    model.requires_grad_(False)
    return model.eval()
