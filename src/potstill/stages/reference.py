"""The model that exported files must answer as, and what it answers itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from potstill.core.artifact import Artifact
from potstill.core.errors import UserError
from potstill.edges.models import PACKED, Model, Tokenizer, as_dtype, load_model, positions_of
from potstill.edges.sampling import generate
from potstill.edges.tokens import control_tokens
from potstill.exporters._ends import end_ids
from potstill.stages.lineage import behind
from potstill.stages.passages import Passages, Places
from potstill.study.parity import distance

WORDS = 40  # tokens of the greedy text


@dataclass
class Reference:
    """The model that files must answer as.

    Attributes:
        model: with the weights that were exported.
        tokenizer: with the chat template that was exported.
        passages: what it is asked.
        named: what people call it.
        full: where it lies before it was quantised; "": it was not, or nobody knows.
        own_unknown: why `own_kl` is not known though there is a model before it; "" as long as that was not found.
    """

    model: Model
    tokenizer: Tokenizer
    passages: Passages
    named: str
    full: str = ""
    own_unknown: str = ""
    _known: dict[int, np.ndarray] = field(default_factory=dict)
    _own_kl: dict[int, float] = field(default_factory=dict)

    @cached_property
    def _exact(self) -> Model:
        """The model in float32, in which it is computed with."""
        import torch

        return as_dtype(self.model, torch.float32).eval()

    def logp_PV(self, count: int) -> np.ndarray:
        """Its log-probabilities at so many places of the passages, computed once.

        Raises:
            UserError: they are not numbers.
        """
        if count not in self._known:
            found_PV = logp_at(self._exact, self.passages.chosen(count))
            if np.isnan(found_PV).any():
                raise UserError(
                    f"{self.named}: its own logits are not numbers, so nothing can be compared with it; choose another"
                )
            self._known[count] = found_PV
        return self._known[count]

    @cached_property
    def control(self) -> list[str]:
        """Its tokenizer's control tokens."""
        return list(control_tokens(self.tokenizer))

    @cached_property
    def ends(self) -> list[int]:
        """Tokens that end an answer, as a file must name them."""
        return end_ids(self.model, self.tokenizer)

    @cached_property
    def greedy(self) -> str:
        """Its answer to the first passage."""
        return greedy(self._exact, self.tokenizer, self.passages.first)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(self.tokenizer(text).input_ids) for text in texts]

    def kl_of_storing(self, count: int, type: str) -> float:
        """What weights in "f16" or "bf16" do by themselves, in KL at the same positions."""
        import torch

        stored = as_dtype(self._exact, {"f16": torch.float16, "bf16": torch.bfloat16}[type])
        return distance(self.logp_PV(count), logp_at(as_dtype(stored, torch.float32), self.passages.chosen(count))).kl

    @cached_property
    def _full(self) -> Model:
        """The model before it was quantised.

        Raises:
            UserError: it is gone, out of reach, or another one than it was.
        """
        found = load_model(self.full)
        rows, ours = (model.get_input_embeddings().weight.shape[0] for model in (found, self.model))
        if rows != ours:
            raise UserError(f"{self.full}: its vocabulary has {rows:,} rows, ours {ours:,}: it is no longer what was quantised")
        return found

    def own_kl(self, count: int) -> float | None:
        """What rounding itself cost, in KL at the same positions; None where nothing is known of the model before it."""
        if not self.full or self.own_unknown:
            return None
        if count not in self._own_kl:
            try:
                self._own_kl[count] = distance(logp_at(self._full, self.passages.chosen(count)), self.logp_PV(count)).kl
            except (UserError, OSError) as error:
                self.own_unknown = str(error)
                return None
        return self._own_kl[count]


def logp_at(model: Model, chosen: Places) -> np.ndarray:
    """Log-probabilities [P, V] of the tokens at the chosen places, each after all before it."""
    import torch

    found = []
    with torch.inference_mode():
        for ids, places in chosen:
            logits_TV = model(torch.tensor([ids], device=model.device)).logits[0]
            at_P = torch.tensor([place - 1 for place in places], device=model.device)
            found.append(logits_TV[at_P].double().log_softmax(-1).float().cpu().numpy())
    return np.concatenate(found)


def greedy(model: Model, tokenizer: Tokenizer, prompt: list[int]) -> str:
    limit = positions_of(model.config)
    words = WORDS if limit is None else min(WORDS, limit - len(prompt))
    return generate(model, tokenizer, [prompt], stop_ids=[], max_new_tokens=max(1, words)).texts[0]


def full_precision(artifact: Artifact | None) -> str:
    """Where a model lies as it was before it was quantised; "" of one that was not, or where nothing says so."""
    where = ""
    while artifact is not None and (artifact.folder / PACKED).is_file():
        before = str(artifact.stage.get("model") or artifact.stage.get("student", ""))  # of one that was healed, its student
        artifact = behind(artifact, before)
        beside = f"path:{artifact.folder}" if artifact is not None else ""
        where = beside if before.startswith("stage:") else before
    return where
