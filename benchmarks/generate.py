"""Answers to many prompts of uneven lengths: potstill's decoding against transformers' `generate`.

    POTSTILL_REAL_MODELS=.models python benchmarks/generate.py      # SmolLM2 answers docstrings of the standard library

Greedy, up to `--new` tokens, batches of 64 padded on the left. `plain` calls `model.generate` on the prompts in their order, as
a user would; `sorted` on prompts sorted by length; `potstill` decodes as `evaluate` does. Each in float32 and with the weights
in bfloat16. Answers end where the model ends them. Texts of one precision are compared before times are shown: rounding alone
may part two ways, where two tokens are nearly as likely.
"""

import argparse
import sys
import time
from typing import Any

from _bench import add_output, facts, hand_over, in_turn, runner, shown, spread, table
from _models import real_model

PRECISIONS, WAYS = ("fp32", "bf16"), ("potstill", "plain", "sorted")
BATCH = 64


def prompts_of(tokenizer: Any, rows: int) -> tuple[list[list[int]], list[int]]:
    """Prompts in the model's own form, drawn evenly from all, and the tokens that end an answer."""
    from potstill.data.prompts import Prompts, Renderer
    from potstill.sources.stdlib import Stdlib

    renderer = Renderer(tokenizer, Prompts(max_tokens=512, max_prompt_tokens=384))
    every = list(Stdlib(max_lines=12).rows())
    found = (renderer.prompt(every[i * len(every) // rows]).ids for i in range(rows))
    return [ids for ids in found if ids is not None], renderer.stop_ids


def plain(model: Any, tokenizer: Any, prompts: list[list[int]], stops: list[int], new: int) -> list[list[int]]:
    import torch

    answers: list[list[int]] = []
    for begin in range(0, len(prompts), BATCH):
        rows = prompts[begin : begin + BATCH]
        given = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**given, max_new_tokens=new, do_sample=False, eos_token_id=stops)
        for row in out[:, given["input_ids"].shape[1] :].tolist():
            end = next((n + 1 for n, token in enumerate(row) if token in stops), len(row))
            answers.append(row[:end])
    return answers


def measured(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    from potstill.edges.models import load_model, load_tokenizer
    from potstill.edges.sampling import generate

    where = real_model()
    assert where is not None
    model = load_model(where, torch.bfloat16 if job["precision"] == "bf16" else torch.float32)
    tokenizer = load_tokenizer(where)
    prompts, stops = prompts_of(tokenizer, job["rows"])
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i])) if job["way"] == "sorted" else list(range(len(prompts)))

    def answered(rows: list[int], new: int) -> list[str]:
        asked = [prompts[i] for i in rows]
        if job["way"] == "potstill":
            return generate(model, tokenizer, asked, stop_ids=stops, max_new_tokens=new).texts
        found = plain(model, tokenizer, asked, stops, new)
        return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]

    answered(order[:2], 2)
    begun = time.perf_counter()
    texts = answered(order, job["new"])
    seconds = time.perf_counter() - begun
    lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    by_row = dict(zip(order, texts, strict=True))
    return {"seconds": seconds, "texts": [by_row[i] for i in range(len(prompts))], "lengths": sorted(lengths)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output(parser)
    parser.add_argument("--rows", type=int, default=96, help="prompts")
    parser.add_argument("--new", type=int, default=128, help="longest answer, in tokens")
    words = parser.parse_args()
    measure = runner(__file__, measured, words.here)
    if words.one:
        import json

        print(json.dumps(measured(json.loads(words.one))))
        return
    if real_model() is None:
        sys.exit("skipped: POTSTILL_REAL_MODELS names no folder that holds smollm2 (make models)")

    def one(name: tuple[str, str]) -> dict[str, Any]:
        return measure({"way": name[0], "precision": name[1], "rows": words.rows, "new": words.new})

    names = [(way, precision) for precision in PRECISIONS for way in WAYS]
    rounds = in_turn(names, words.rounds or 3, one)
    first = rounds[0]
    lengths = first["potstill", "fp32"]["lengths"]
    found: dict[str, Any] = {
        "rows": len(lengths),
        "new": words.new,
        "answer_tokens": {"median": lengths[len(lengths) // 2], "at_limit": sum(n >= words.new - 1 for n in lengths)},
        "speedup": {},
        "equal_texts": {},
        **facts(),
    }
    lines = []
    for precision in PRECISIONS:
        ours = first["potstill", precision]["texts"]
        for way in WAYS:
            seconds = [each[way, precision]["seconds"] for each in rounds]
            ratios = [each[way, precision]["seconds"] / each["potstill", precision]["seconds"] for each in rounds]
            to_fp32 = [each["plain", "fp32"]["seconds"] / each[way, precision]["seconds"] for each in rounds]
            same = sum(a == b for a, b in zip(first[way, precision]["texts"], ours, strict=True))
            found["speedup"][f"{way} {precision}"] = {"over_plain_fp32": spread(to_fp32), "seconds": spread(seconds)}
            found["equal_texts"][f"{way} {precision}"] = same
            lines.append(
                [f"{way}, {precision}", shown(seconds, 1), f"{shown(ratios)}×", f"{shown(to_fp32)}×", f"{same} of {len(ours)}"]
            )
    table(["way", "seconds", "takes longer than potstill", "faster than plain, fp32", "texts as potstill's"], lines)
    hand_over(found, [{" ".join(name): each["seconds"] for name, each in turn.items()} for turn in rounds], words)


if __name__ == "__main__":
    main()
