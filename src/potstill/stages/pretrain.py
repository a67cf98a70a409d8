"""A small base model from scratch, where no ready one can be had."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache as cached
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from potstill.core.component import Settings
from potstill.core.errors import Problem, UserError
from potstill.core.types import Example, Split
from potstill.data.store import Counts, text_pairs
from potstill.edges import ranks
from potstill.edges.blank import new_model, qwen2_config
from potstill.edges.bpe import train_tokenizer
from potstill.edges.models import device, save_model, size_of
from potstill.edges.vocabulary import load_tokenizer
from potstill.losses.cross_entropy import CrossEntropy
from potstill.sources import Source
from potstill.stages.base import Context, DataStage, empty_split
from potstill.stages.cost import training_cost
from potstill.stages.known import Noted
from potstill.stages.outlook import Cost, Outlook, Prospect, RowsOf
from potstill.stages.refs import ModelRef
from potstill.stages.training import tidy, tokenised, trained_in_words, trained_record
from potstill.train.loop import Optim, fit
from potstill.train.team import full_model


class Shape(Settings):
    """A Qwen2 model's dimensions; head and embedding share one matrix."""

    hidden_size: int = Field(default=192, ge=8, description="width")
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1, description="attention heads")
    kv_heads: int = Field(default=2, ge=1, description="key-value heads; divides heads")
    intermediate_size: int = Field(default=512, ge=8, description="width of the feed-forward layer")
    positions: int = Field(default=2048, ge=8, description="longest sequence, in tokens")

    @model_validator(mode="after")
    def _divisible(self) -> "Shape":
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size = {self.hidden_size} must be an even multiple of heads = {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads = {self.kv_heads} must divide heads = {self.heads}")
        return self

    def config(self, vocab_size: int, **ids: Any) -> Any:
        """The transformers config."""
        return qwen2_config(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.positions,
            tie_word_embeddings=True,
            **ids,
        )


class Pretrain(DataStage, kind="pretrain"):
    """Train a byte-level BPE tokenizer and a small Qwen2 on the text of the training rows, as a base to tune.

    With `text = "prompts"` the model reads instructions and contexts but never a response, so it knows the words and not the
    answers. The result is saved as any Hub model is.
    """

    shared: ClassVar[bool] = True

    shape: Shape = Shape()
    vocab_size: int = Field(default=2048, ge=300, description="tokens of a new tokenizer; fewer when the text holds no more")
    tokenizer: ModelRef | None = Field(default=None, description="take this model's tokenizer instead of training one")
    text: Literal["prompts", "rows"] = Field(default="prompts", description="prompts only, or prompts and responses")
    optim: Optim = Optim(lr=1e-3, epochs=2, schedule="cosine", warmup=0.05)
    tokenizer_rows: int = Field(default=20_000, ge=1, description="rows that a new tokenizer learns from")

    def reader(self) -> ModelRef | None:
        return self.tokenizer

    def problems(self, outlook: Outlook) -> Iterator[Problem]:
        left_out: Counter[str] = Counter()
        try:  # text of any length is read, and nothing is rendered
            if next(self.data.examples("train", left_out), None) is None:
                yield Problem("data", empty_split(RowsOf("train", 0, left_out)))
        except UserError as error:
            yield Problem("data", str(error))
        if self.tokenizer is not None:
            try:
                outlook.tokenizer(self.tokenizer)
            except UserError as error:
                yield Problem("tokenizer", str(error), repr(str(self.tokenizer)))

    def prospect(self, outlook: Outlook) -> Prospect:
        find = cached(lambda: self._tokenizer(outlook))
        tokenizer = find() if self.tokenizer is not None else None
        config = self.shape.config(len(tokenizer) if tokenizer is not None else self.vocab_size)
        return Prospect(config, size_of(config), find)

    def _tokenizer(self, outlook: Outlook) -> Any | None:
        """The tokenizer it will have: another model's, or the one that its rows give, which takes a second to train."""
        if self.tokenizer is not None:
            return outlook.tokenizer(self.tokenizer)
        try:
            return train_tokenizer(texts(self.data, "train", "rows", self.tokenizer_rows), self.vocab_size)
        except UserError:  # no rows, which `problems` says
            return None

    def cost(self, outlook: Outlook) -> Cost:
        found = self.prospect(outlook)
        tokenizer = found.tokenizer()
        if tokenizer is None:
            return Cost()
        total = sum(len(tokenizer.encode(text)) + 1 for text in texts(self.data, "train", self.text, None))
        window = min(self.prompts.max_tokens, self.shape.positions) - 1
        rows = RowsOf("train", -(-total // window), {}, 0, 1.0, float(min(total, window)), window + 1, 1, 0, ((1, window),))
        return training_cost(outlook, found, self.optim, rows, window + 1)

    def learned_rows(self) -> Iterator[Example]:
        return self.data.examples("train") if self.text == "rows" else iter(())

    def closing(self, summary: dict[str, Any]) -> str:
        return trained_in_words(summary)

    def run(self, context: Context) -> dict[str, Any]:
        import torch

        work = context.work
        if self.tokenizer is not None:
            tokenizer = load_tokenizer(context.where(self.tokenizer))
        else:
            rows = texts(self.data, "train", "rows", self.tokenizer_rows)
            tokenizer = ranks.on_first(lambda: train_tokenizer(rows, self.vocab_size))
        counts = Counts()
        noted = Noted()
        passages = texts(self.data, "train", self.text, None, counts.dropped, noted if self.text == "rows" else None)
        pairs = text_pairs(passages, tokenizer, min(self.prompts.max_tokens, self.shape.positions))
        store = tokenised(work.folder / "tokens", pairs, counts, f"{work.name}: text of {self.data.kind}")
        if ranks.first() and self.text == "rows":
            noted.save(work.folder)
        torch.manual_seed(self.seed)
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        model = new_model(self.shape.config(len(tokenizer), **ids)).to(device())
        totals = fit(model, store, CrossEntropy(), self.optim, work, seed=self.seed)
        with full_model(model) as plain:
            if plain is not None:
                save_model(plain, tokenizer, work.folder, [tokenizer.eos_token_id])
        record = trained_record(self, store, totals, start="new weights")
        tidy(context)
        parameters = sum(p.numel() for p in model.parameters())
        facts = {"parameters": parameters, "vocabulary": len(tokenizer), "trained": record.model_dump(mode="json")}
        return {**asdict(totals), **facts}


def texts(
    source: Source,
    split: Split,
    what: Literal["prompts", "rows"],
    limit: int | None,
    skipped: Counter[str] | None = None,
    noted: Noted | None = None,
) -> Iterator[str]:
    """Each row as running text.

    Raises:
        UserError: no row is left; says why.
    """
    skipped = skipped if skipped is not None else Counter()
    count = 0
    rows = source.examples(split, skipped)
    for example in noted(rows) if noted is not None else rows:
        parts = [*(turn.content for turn in example.history), example.context, example.instruction]
        parts += [turn.content for turn in example.since]
        yield "\n".join([part for part in parts if part] + ([example.response] if what == "rows" else []))
        count += 1
        if count == limit:
            return
    if not count:
        why = ", ".join(f"{n:,} {reason}" for reason, n in skipped.items()) or "the split is empty"
        raise UserError(f"no {'training' if split == 'train' else split} row of {source.kind} is left ({why})")
