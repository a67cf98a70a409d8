"""A small base model from scratch, where no ready one can be had."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from potstill.core.component import Settings
from potstill.core.errors import UserError
from potstill.core.types import Split
from potstill.data.store import Counts, text_pairs
from potstill.edges import ranks
from potstill.edges.bpe import train_tokenizer
from potstill.edges.models import device, load_tokenizer, save_model
from potstill.losses.objectives import CrossEntropy
from potstill.sources import Source
from potstill.stages.base import Context, DataStage, ModelRef
from potstill.stages.training import tidy, tokenised
from potstill.train.loop import Optim, fit
from potstill.train.team import whole


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
        from transformers import Qwen2Config

        return Qwen2Config(
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

    def run(self, context: Context) -> dict[str, Any]:
        import torch
        from transformers import Qwen2ForCausalLM

        work = context.work
        if self.tokenizer is not None:
            tokenizer = load_tokenizer(context.where(self.tokenizer))
        else:
            rows = texts(self.data, "train", "rows", self.tokenizer_rows)
            tokenizer = ranks.on_first(lambda: train_tokenizer(rows, self.vocab_size))
        counts = Counts()
        passages = texts(self.data, "train", self.text, None, counts.dropped)
        pairs = text_pairs(passages, tokenizer, min(self.prompts.max_tokens, self.shape.positions))
        store = tokenised(work.folder / "tokens", pairs, counts, f"{work.name}: text of {self.data.kind}")
        torch.manual_seed(self.seed)
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        model = Qwen2ForCausalLM(self.shape.config(len(tokenizer), **ids)).to(device())
        summary = fit(model, store, CrossEntropy(), self.optim, work, seed=self.seed)
        with whole(model) as plain:
            if plain is not None:
                save_model(plain, tokenizer, work.folder, [tokenizer.eos_token_id])
        tidy(context)
        return {**summary, "parameters": sum(p.numel() for p in model.parameters()), "vocabulary": len(tokenizer)}


def texts(
    source: Source, split: Split, what: Literal["prompts", "rows"], limit: int | None, skipped: Counter[str] | None = None
) -> Iterator[str]:
    """Each row as running text.

    Raises:
        UserError: no row is left; says why.
    """
    skipped = skipped if skipped is not None else Counter()
    count = 0
    for example in source.examples(split, skipped):
        parts = [*(turn.content for turn in example.history), example.context, example.instruction]
        parts += [turn.content for turn in example.since]
        yield "\n".join([part for part in parts if part] + ([example.response] if what == "rows" else []))
        count += 1
        if count == limit:
            return
    if not count:
        why = ", ".join(f"{n:,} {reason}" for reason, n in skipped.items()) or "the split is empty"
        raise UserError(f"no {'training' if split == 'train' else split} row of {source.kind} is left ({why})")
