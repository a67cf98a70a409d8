"""What stages cost: arithmetic, time, and the memory of the process at its peak."""

from dataclasses import replace
from typing import Any

from potstill.data.batches import MOST_WHOLE
from potstill.edges.decoding import BATCH_ROWS
from potstill.edges.experts import inner_units, names_experts
from potstill.edges.machine import resting_memory
from potstill.edges.models import Size, device, head_width
from potstill.losses.head import BLOCK_BYTES, CHUNK_BYTES, GPU_BYTES
from potstill.losses.scoring import MAX_TOKENS
from potstill.stages.outlook import Cost, Outlook, Prospect, RowsOf, Step
from potstill.train.loop import Optim, in_bf16
from potstill.train.probe import Probe

FLOAT = 4  # bytes
ADAM = 2 * FLOAT  # two averages of each trained weight
ATTENDED = 4 * FLOAT  # bytes per token, channel and layer kept of attention: query, key, value, what they give; measured
SAVED = 8 * FLOAT, 4.5 * FLOAT  # bytes per token and layer kept for backward: of a channel, of an inner unit; measured


def training_cost(
    outlook: Outlook,
    model: Prospect,
    optim: Optim,
    rows: RowsOf,
    longest: int,
    *,
    frozen: bool = False,
    pace: tuple[int, int] | None = None,
    read: float | None = None,
    learned: float | None = None,
    adaptable: bool = False,
) -> Cost:
    """Of training on a split's rows by cross-entropy.

    Args:
        frozen: adapters alone are trained.
        pace: steps, and rows that they learn from, where a model writes some of them.
        read: tokens that all steps read, where some rows share a prompt; default: each row is read whole.
        learned: response tokens that all steps learn, where a model writes some of them; default: those of the rows.
        adaptable: they are not, and could be.
    """
    size = model.size
    cost = Cost(
        parameters=size.parameters,
        output_bytes=FLOAT * size.parameters,
        memory_bytes=training_memory(outlook, model, optim, rows, longest, frozen=frozen),
        less_memory=less_memory(optim, adaptable),
        rows=(rows,),
    )
    if not rows.kept:
        return replace(cost, note="no training row is left")
    steps = optim.total_steps(rows.kept)
    seen = steps * optim.batch_size if optim.steps is not None else round(rows.kept * optim.epochs)
    if pace is not None:
        steps, seen = pace
    tokens = seen * rows.tokens if read is None else read
    learned = seen * rows.response if learned is None else learned
    flops = training_flops(size, optim, tokens, learned)
    memory = cost.memory_bytes or 0
    if read is not None:
        memory += whole_rows_memory(model, optim, rows, longest, (seen * rows.prompt + learned) / max(1.0, read))
    probe = outlook.probe(model.config, rows, optim.precision)
    again = probe.forward_seconds(tokens) if probe is not None and optim.activation_checkpointing else 0.0
    return replace(
        cost,
        steps=steps,
        memory_bytes=round(memory),
        tokens=round(tokens),
        response_tokens=round(learned),
        flops=flops,
        seconds=steps * probe.step_seconds(tokens / steps) + again if probe is not None else None,
        step=Step(size, None, rows.tokens, longest, flops / steps),
    )


def training_flops(size: Size, optim: Optim, tokens: float, learned: float) -> float:
    """Forward and backward over so many tokens, of which so many are in the loss.

    6 for each parameter that a token passes through, attention's own products left out; 8 where layers are computed again.
    """
    again = 2 * size.active * tokens if optim.activation_checkpointing else 0
    return 6 * size.active * tokens + 6 * size.hidden * size.vocab * learned + again


def reading_flops(size: Size, tokens: float, responses: float) -> float:
    """Forward alone over so many tokens, with a distribution for so many of them."""
    return 2 * size.active * tokens + 2 * size.hidden * size.vocab * responses


def less_memory(optim: Optim, adaptable: bool) -> str:
    """What has not been done yet to need less memory."""
    ways = ["lower optim.micro_batch_tokens"]
    ways += [] if optim.activation_checkpointing else ["set optim.activation_checkpointing"]
    ways += ["train with `adapter`"] if adaptable else []
    return ", ".join(ways[:-1]) + ("," * (len(ways) > 2) + " or " if ways[1:] else "") + ways[-1]


def answer_seconds(probe: Probe, rows: RowsOf, asked: int, new_tokens: int, samples: int = 1) -> float:
    """Of so many answers to each of so many rows: a prompt is read once for its answers, which then come token by token."""
    return probe.forward_seconds(asked * rows.prompt) + probe.decode_seconds(asked * samples, new_tokens)


def answer_flops(size: Size, rows: RowsOf, asked: int, new_tokens: float, samples: int = 1) -> float:
    """Of so many answers to each of so many rows: prompts and answers read once, and a distribution for each new token."""
    drawn = asked * samples * new_tokens
    return reading_flops(size, asked * rows.prompt + drawn, drawn)


def answer_memory(config: Any, rows: RowsOf, asked: int, new_tokens: int) -> float:
    """Keys and values of the answers that are generated together; the cache of one layer is copied as it grows.

    A model without attention keeps none.
    """
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
    if not heads:
        return 0.0
    tokens = min(asked, BATCH_ROWS) * (rows.longest_prompt + new_tokens)
    return 2 * FLOAT * tokens * heads * head_width(config) * (config.num_hidden_layers + 1)


def scoring_memory(model: Prospect, rows: RowsOf, asked: int, *, teacher: bool) -> float:
    """Of reading rows without training: a layer's work, then logits and log-probabilities, of a teacher too, and a product."""
    share = min(1.0, MAX_TOKENS / max(1.0, asked * rows.tokens))
    responses = share * asked * rows.response
    inner = _inner(model)
    layer = FLOAT * share * asked * rows.tokens * (6 * model.size.hidden + 3 * inner)
    return layer + (5 if teacher else 3) * min(CHUNK_BYTES, FLOAT * model.size.vocab * responses)


def training_memory(
    outlook: Outlook, model: Prospect, optim: Optim, rows: RowsOf, longest: int, *, frozen: bool = False
) -> int:
    """Weights, gradients, two averages, what a micro-batch keeps for backward, and the fused head's buffers."""
    size = model.size
    tokens = _pass(model, optim, rows, longest)
    inner = _inner(model)
    layers, layer = model.config.num_hidden_layers, SAVED[0] * size.hidden + SAVED[1] * inner
    saved = tokens * (FLOAT * size.hidden * layers + layer if optim.activation_checkpointing else layer * layers)
    trained = 0 if frozen else size.parameters
    held = FLOAT * size.parameters + (FLOAT + ADAM) * trained
    held += FLOAT // 2 * trained if in_bf16(optim.precision) else 0  # the bits that were rounded off
    held += left_over(size)
    return round(resting_memory() + held + saved + head_memory(size, tokens * rows.response / max(rows.tokens, 1.0)))


def whole_rows_memory(model: Prospect, optim: Optim, rows: RowsOf, longest: int, whole: float) -> float:
    """What attention keeps for backward of rows that share a prompt, beyond what it would keep of the tokens read.

    Args:
        whole: tokens of the whole rows for each token read.
    """
    more = max(0.0, min(whole, MOST_WHOLE) - 1) * _pass(model, optim, rows, longest)
    return ATTENDED * more * model.size.hidden * (1 if optim.activation_checkpointing else model.config.num_hidden_layers)


def _pass(model: Prospect, optim: Optim, rows: RowsOf, longest: int) -> float:
    """Tokens of one forward pass."""
    return min(max(optim.pass_tokens(model.size.hidden), longest), optim.batch_size * max(rows.tokens, 1.0))


def _inner(model: Prospect) -> int:
    """Inner units of a layer, of the experts that a token passes through."""
    if names_experts(model.config):
        return inner_units(model.config)
    return getattr(model.config, "intermediate_size", None) or 4 * model.size.hidden


def head_memory(size: Size, responses: float, teacher: bool = False) -> float:
    """A chunk's logits and their gradient, twice with a teacher, and hidden states with theirs."""
    if device().type == "cuda":
        return GPU_BYTES * (2 if teacher else 1)
    chunk = min(CHUNK_BYTES, FLOAT * size.vocab * max(responses, 1.0))
    return chunk * (2 if teacher else 1) + 6 * min(BLOCK_BYTES, chunk) + 2 * FLOAT * responses * size.hidden


def left_over(size: Size) -> float:
    """What the C library keeps of models that earlier stages loaded: measured, benchmarks/plan.py."""
    return 3.0 * size.parameters


def teacher_bytes(size: Size, precision: str, train_precision: str) -> float:
    """Of a teacher's weights in memory."""
    wide = 2 if precision == "bf16" or (precision != "fp32" and in_bf16(train_precision)) else FLOAT
    return (size.body + wide * (size.embedding + size.head)) if precision == "int8" else wide * size.parameters
