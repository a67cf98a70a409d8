"""What the teacher says of a batch: live, or read back from a cache that is filled as rows are first seen."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.core.errors import UserError
from potstill.data.batches import Batch
from potstill.edges.adapters import switched_off
from potstill.edges.families import Logits, logits_of
from potstill.losses.head import logit_chunks, response_hidden
from potstill.losses.targets import Buckets, Dense
from potstill.teachers.cache import RowCache, row_key


class Live:
    """The teacher runs beside the student.

    Args:
        teacher: a model in evaluation mode; its gradient is never taken.
    """

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher

    def __call__(self, batch: Batch) -> Dense:
        hidden_ND = teacher_hidden(self.teacher, batch)
        return Dense(hidden_ND, self.teacher.get_output_embeddings(), logits_of(self.teacher.config))

    def facts(self) -> dict[str, Any]:
        return {"kept": "live"}


class Recalled:
    """A live teacher that reads what the student wrote once, however many updates learn from it; what it said last is kept.

    A batch that was read is known by its tokens: other batches of the same rows would round otherwise, and are read again.
    """

    def __init__(self, live: Live) -> None:
        self.live = live
        self._hidden: dict[bytes, Tensor] = {}

    @property
    def teacher(self) -> Any:
        return self.live.teacher

    def forget(self) -> None:
        """Before a round of new answers."""
        self._hidden.clear()

    def __call__(self, batch: Batch) -> Dense:
        if not batch.sampled:
            return self.live(batch)
        key = batch.key()
        if key not in self._hidden:
            self._hidden[key] = self.live(batch).hidden_ND
        said = self._hidden[key].clone()  # what was read without gradients must not enter a graph
        return Dense(said, self.teacher.get_output_embeddings(), logits_of(self.teacher.config))

    def facts(self) -> dict[str, Any]:
        return self.live.facts()


class Unadapted:
    """What a student with adapters would say without them: its own start, at no memory."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, batch: Batch) -> Dense:
        with switched_off(self.model):
            hidden_ND = teacher_hidden(self.model, batch)
        return Dense(hidden_ND, self.model.get_output_embeddings(), logits_of(self.model.config))

    def facts(self) -> dict[str, Any]:
        return {"kept": "live"}


def teacher_hidden(teacher: Any, batch: Batch) -> Tensor:
    """Final hidden states [N, D].

    Raises:
        UserError: some are not finite.
    """
    with torch.no_grad():
        hidden_ND = response_hidden(teacher, batch)
    if not bool(torch.isfinite(hidden_ND).all()):
        raise UserError(
            "the teacher's hidden states are not finite (NaN or infinite); its weights are damaged or it overflows in "
            "this precision: look at its own evaluation, or choose another precision"
        )
    return hidden_ND


class HiddenForm:
    """Final hidden states in bfloat16, 2·D bytes a token; the whole distribution comes back through the teacher's head."""

    name = "hidden"

    def __init__(self, head: nn.Linear, form: Logits) -> None:
        self.head, self.form = head, form
        self.width = 2 * head.in_features

    def encode(self, hidden_ND: Tensor) -> np.ndarray:
        """uint8 [N, width]."""
        return hidden_ND.to(torch.bfloat16).contiguous().cpu().view(torch.uint8).numpy()

    def decode(self, values: np.ndarray, device: torch.device) -> Dense:
        hidden_ND = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        return Dense(hidden_ND.to(device), self.head, self.form)


class TopKForm:
    """The k most probable tokens of the shared vocabulary and the exact mass of the rest, 8·k + 4 bytes a token.

    A divergence over these k + 1 outcomes is never more than over the whole vocabulary (data processing inequality), and is
    exact where the student spreads the rest as the teacher does.
    """

    name = "topk"

    def __init__(self, head: nn.Linear, form: Logits, k: int, temperature: float, vocab: int) -> None:
        self.head, self.form, self.k, self.temperature, self.vocab = head, form, k, temperature, vocab
        self.width = 8 * k + 4

    def encode(self, hidden_ND: Tensor) -> np.ndarray:
        """uint8 [N, width]: ids as uint32, then log-probabilities as float32, the rest's last."""
        parts = []
        for _, logits_CV in logit_chunks(hidden_ND, self.head, form=self.form):
            logp_CV = F.log_softmax(logits_CV[:, : self.vocab] / self.temperature, dim=-1)
            top_CK, ids_CK = logp_CV.topk(self.k, dim=-1)
            rest_C = logp_CV.scatter(-1, ids_CK, -torch.inf).logsumexp(-1)
            values = torch.cat([top_CK, rest_C[:, None]], dim=-1).float().cpu().contiguous()
            ids = ids_CK.to(torch.int32).cpu().contiguous()
            parts.append(np.concatenate([ids.view(torch.uint8).numpy(), values.view(torch.uint8).numpy()], axis=1))
        return np.concatenate(parts) if parts else np.empty((0, self.width), np.uint8)

    def decode(self, values: np.ndarray, device: torch.device) -> Buckets:
        words = values.view(np.int32)
        ids_NK = torch.from_numpy(words[:, : self.k].astype(np.int64))
        return Buckets(ids_NK.to(device), torch.from_numpy(words[:, self.k :].copy().view(np.float32)).to(device))


Form = HiddenForm | TopKForm


class Waiting:
    """Which rows are still to come: 9 bytes each, however many."""

    def __init__(self, keys: Iterable[bytes]) -> None:
        self._keys = np.unique(np.frombuffer(b"".join(key[:8] for key in keys), "<u8"))
        self._there = np.zeros(len(self._keys), dtype=bool)
        self.left = len(self._keys)

    def came(self, key: bytes) -> None:
        at = int(np.searchsorted(self._keys, np.frombuffer(key[:8], "<u8")[0]))
        if at < len(self._keys) and self._keys[at].tobytes() == key[:8] and not self._there[at]:
            self._there[at] = True
            self.left -= 1


class Cached:
    """Values are computed once per row, stored, and then read; the teacher is loaded only while rows are missing.

    What is computed passes through the stored form before it is used, so that a row counts the same whether it was read or
    has just been computed. Where a row of a batch is missing, the teacher reads the whole batch: its sums then round as they
    would have without an interruption. Rows that were there stay as they were read.

    Args:
        cache: where rows are kept.
        form: how hidden states become values.
        load: gives the teacher.
        missing: rows that are not there yet; the teacher is let go when all are.
        needed: whether the teacher must read a batch, given whether rows of it are missing here.
    """

    def __init__(
        self,
        cache: RowCache,
        form: Form,
        load: Callable[[], Any],
        missing: Iterable[bytes],
        needed: Callable[[bool], bool] = lambda lacking: lacking,
    ) -> None:
        self.cache, self.form, self._load, self._needed = cache, form, load, needed
        self.waiting = Waiting(missing)
        self._teacher: Any = None
        self._let_go = False
        self.read = self.computed = 0  # rows

    def __call__(self, batch: Batch) -> Dense | Buckets:
        values = np.empty((len(batch.target_N), self.form.width), np.uint8)
        rows = _rows(batch)
        lacking = self._unread(rows, values)
        if lacking:
            self.cache.refresh()  # another process may have written them since
            lacking = self._unread(lacking, values)
        self.read += len(rows) - len(lacking)
        if self._needed(bool(lacking)):
            fresh = self.form.encode(teacher_hidden(self._loaded(), batch))
            kept: dict[bytes, slice] = {}  # a step across the end of an epoch may see a row twice: the first counts
            for key, where in lacking:
                values[where] = fresh[kept.setdefault(key, where)]
            for key, where in kept.items():
                if self.cache.append(key, fresh[where]):
                    self.waiting.came(key)
            self.computed += len(kept)
        if self._teacher is not None and not self.waiting.left and not self._let_go and not self.cache.readonly:
            self._teacher, self._let_go = None, True
        return self.form.decode(values, batch.target_N.device)

    def _unread(self, rows: list[tuple[bytes, slice]], values: np.ndarray) -> list[tuple[bytes, slice]]:
        """Fill in what can be read; the rows that cannot."""
        lacking = []
        for key, where in rows:
            if self.cache.read(key, values[where]):
                self.waiting.came(key)
            else:
                lacking.append((key, where))
        return lacking

    def _loaded(self) -> Any:
        """The teacher; loaded a second time, after damage, it stays."""
        if self._teacher is None:
            self._teacher = self._load()
            self.form.head = self._teacher.get_output_embeddings()  # one in memory, not two
        return self._teacher

    def facts(self) -> dict[str, Any]:
        return {
            "kept": self.form.name,
            "bytes_per_token": self.form.width,
            "rows_read": self.read,
            "rows_computed": self.computed,
            "rows_damaged": self.cache.lost,
            "bytes": self.cache.bytes(),
        }


def _rows(batch: Batch) -> list[tuple[bytes, slice]]:
    """Key and response tokens of each row of a batch that has any."""
    ids_F = batch.whole_ids().cpu().numpy()
    found, token, at = [], 0, 0
    for length, response in zip(batch.lengths, batch.responses, strict=True):
        row = ids_F[token : token + length]
        if response:
            found.append((row_key(row[: length - response], row[length - response :]), slice(at, at + response)))
        token, at = token + length, at + response
    return found
