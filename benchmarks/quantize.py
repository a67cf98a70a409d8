"""What four bits cost a model, step by step of the solver, beside rounding and ggml's own Q4_0.

    python benchmarks/quantize.py [--model path:FOLDER] [--rows FILE.jsonl] [--draws 3] [--save FILE]

Each way quantises the same model, calibrated on each draw of rows in turn, in a process of its own: KL from the full precision
to the quantised model in nats per response token of test rows, how often both put the same token first, seconds
and memory. All have 4.5 bits per weight: groups of 32 with a scale in float16. `--quick` measures a small model of random
weights on random tokens, which shows that it runs and little else.

Without `--rows` the rows are those of the built-in source `primer`. Peers run elsewhere, each in its own environment: what one
wrote as a folder that transformers loads is measured by `--measure NAME=FOLDER`.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from _bench import Memory, add_output, facts, hand_over, in_turn, runner, shown, spread, table
from _models import SHAPES, build, real_model

WAYS: dict[str, dict[str, Any]] = {  # from the fourth on each has what stands above it
    "rounding": {"method": "rtn"},
    "ggml Q4_0": {},
    "GPTQ": {"by_activation": False, "sweeps": 0, "make_up": 0.0},
    "by activation": {"sweeps": 0, "make_up": 0.0},
    "and sweeps": {"sweeps": 4, "make_up": 0.0},
    "and making up": {"sweeps": 4, "make_up": 0.5},
    "and scale search": {"sweeps": 4, "make_up": 0.5, "clip_search": True},
}


def model_of(job: dict[str, Any]) -> Any:
    from potstill.edges.models import load_model

    return load_model(job["model"]) if job["model"] else build(SHAPES["quick"], "student", 0).eval()


def pairs_of(job: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Calibration rows of this draw, and the rows held out from all draws."""
    if not job["model"]:
        numbers = random.Random(0)
        made = [([numbers.randrange(1, 32_000) for _ in range(8)], [numbers.randrange(1, 32_000) for _ in range(24)])]
        made += [([*p, *r][:8], [numbers.randrange(1, 32_000) for _ in range(24)]) for p, r in made * 63]
        return random.Random(job["draw"]).sample(made[16:], min(job["count"], 48)), made[:16]
    from potstill.data.prompts import Prompts, Renderer
    from potstill.data.store import Counts, instruction_pairs
    from potstill.edges.models import load_tokenizer
    from potstill.sources import Source

    source = {"kind": "jsonl", "path": job["rows"]} if job["rows"] else {"kind": "primer"}
    renderer = Renderer(load_tokenizer(job["model"]), Prompts(max_tokens=192, max_prompt_tokens=128))
    data: Any = Source.parse(source)
    held, rest = (sorted(data.examples(split), key=lambda example: example.key) for split in ("test", "train"))
    random.Random(7).shuffle(held)
    drawn = random.Random(job["draw"]).sample(rest, min(len(rest), 2 * job["count"]))
    of = partial(instruction_pairs, renderer=renderer, counts=Counts())
    return list(of(drawn))[: job["count"]], list(of(held[: 2 * job["held"]]))[: job["held"]]


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """KL, agreement, seconds and memory of one way on one draw."""
    from potstill.quant.layers import quantise_model
    from potstill.stages.quantize import batches_of

    full, model = model_of(job), model_of(job)
    calibration, held = pairs_of(job)
    memory, begun = Memory(), time.monotonic()
    if job["way"] == "ggml Q4_0":
        by_ggml(model)
    elif job["way"] in WAYS:
        quantise_model(model, batches_of(calibration, 1.0, "cpu"), **WAYS[job["way"]])
    else:
        from potstill.edges.models import load_model

        model = load_model(f"path:{job['folder']}")
    took = {"seconds": time.monotonic() - begun, "memory_bytes": memory.above(), "calibration_tokens": tokens_in(calibration)}
    return {**took, **compared(full, model, held)}


def by_ggml(model: Any) -> None:
    """Every linear layer of the blocks rounded by the quantiser of the gguf package."""
    import gguf
    import torch

    from potstill.edges.codes import weight_of
    from potstill.edges.models import blocks_of, linears_in

    type = gguf.GGMLQuantizationType.Q4_0
    for block in blocks_of(model):
        for layer in linears_in(block).values():
            with torch.no_grad():
                blocks = gguf.quantize(weight_of(layer).float().contiguous().numpy(), type)
                weight_of(layer).copy_(torch.from_numpy(gguf.dequantize(blocks, type)))


def tokens_in(pairs: Sequence[Any]) -> int:
    return sum(len(prompt) + len(response) for prompt, response in pairs)


def compared(full: Any, model: Any, pairs: Sequence[Any]) -> dict[str, float]:
    """Over response tokens."""
    from potstill.losses.scoring import token_sums
    from potstill.metrics.kl_to_teacher import KLToTeacher

    def agree(logq: Any, _: Any, logp: Any) -> Any:
        return (logq.argmax(-1) == logp.argmax(-1)).double()

    vocab = full.get_output_embeddings().weight.shape[0]
    sums = token_sums(model, full, pairs, vocab, {"kl": KLToTeacher(), "same_first": agree})
    tokens = sum(len(response) for _, response in pairs)
    return {name: sum(values) / tokens for name, values in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model of random weights, one draw")
    parser.add_argument("--model", default=None, help="path: or hf: of a model; default: SmolLM2 of POTSTILL_REAL_MODELS")
    parser.add_argument("--rows", default=None, help="a JSONL file of rows; default: the source `primer`")
    parser.add_argument("--count", type=int, default=64, help="calibration rows of a draw")
    parser.add_argument("--held", type=int, default=48, help="rows that are measured on")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), help="those to measure")
    parser.add_argument("--measure", nargs="*", default=[], metavar="NAME=FOLDER", help="what a peer made of the same model")
    add_output(parser)
    words = parser.parse_args()
    here = partial(runner, __file__, measure)
    if words.one:
        print(json.dumps(measure(json.loads(words.one))))
        return
    model = None if words.quick else words.model or real_model()
    if model is None and not words.quick:
        raise SystemExit("name a --model, or set POTSTILL_REAL_MODELS; see `make models`")
    draws = words.rounds or (1 if words.quick else 3)
    base = {"model": model, "rows": words.rows, "count": words.count, "held": words.held}
    folders = dict(word.split("=", 1) for word in words.measure)
    do, rounds = here(words.here), []
    for draw in range(draws):
        jobs = {way: {**base, "way": way, "draw": draw, "folder": folders.get(way)} for way in (*words.ways, *folders)}
        rounds += in_turn([*jobs], 1, lambda way, jobs=jobs: do(jobs[way]))
    ways = {way: {key: spread(found[way][key] for found in rounds) for key in rounds[0][way]} for way in rounds[0]}
    table(
        ["way", "KL, nats a token", "same first token, %", "seconds", "MB"],
        [
            [
                way,
                shown([found[way]["kl"] for found in rounds], 4),
                shown([100 * found[way]["same_first"] for found in rounds], 1),
                shown([found[way]["seconds"] for found in rounds], 0),
                shown([found[way]["memory_bytes"] / 1e6 for found in rounds], 0),
            ]
            for way in ways
        ],
    )
    found = {"model": model or "quick", "rows": words.rows or "primer", "draws": draws, "ways": ways}
    hand_over({**found, **facts()}, rounds, words)


if __name__ == "__main__":
    main()
