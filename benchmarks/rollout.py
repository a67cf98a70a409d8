"""Answers to train on: the local engine against transformers' `generate` over the whole batch, which is TRL's way.

    python benchmarks/rollout.py --quick                                              # under four minutes on two cores
    POTSTILL_REAL_MODELS=.models python benchmarks/rollout.py --shape real            # SmolLM2
    python benchmarks/rollout.py --shape real --rows rows.jsonl --groups 1 4 16

Both sample at temperature 1 from the whole vocabulary, with the same weights, prompts as token ids, limits and precision, and
a short answer to warm up. For each size of a group, `--answers` answers are written: of as many prompts where a group is 1, of
an eighth of them where it is 8. Each engine runs in a process of its own, in turn, `--rounds` times; ratios are taken round by
round. They draw other random numbers, so what is compared is generated tokens per second, the token that ends an answer
included; tokens per answer are printed, and must agree but for sampling. Models with random weights never end an answer by
themselves: a share of their vocabulary counts as ends, so that lengths are uneven as they are in life.

`potstill` also gives each token's log-probability; `generate` does not, and TRL makes a forward pass for it that is not timed
here. Its rows are all answers at once, prompts padded on the left, each prompt as often as its group has answers. Memory is the
peak above the loaded model. Greedy answers, as a study scores them: generate.py.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _bench import Memory, add_output, facts, hand_over, in_turn, runner, shown, spread, synchronize, table
from _models import build, model_of
from kd_epochs import Run, prepare, shape_of
from on_policy_step import MEAN, NEW

ANSWERS = {"tiny": 8, "quick": 64, "cpu": 64, "real": 64, "gpu": 512}
MAX_TOKENS = {"tiny": 64, "quick": 256, "cpu": 256, "real": 384, "gpu": 512}  # of a row; its prompt has at most half of it
ENGINES = ("potstill", "generate")
SEED = 0

Answer = Callable[[list[list[int]], int, int], list[int]]  # prompts, group, longest answer -> tokens of each answer


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """In this process: seconds, generated tokens, answers and peak bytes."""
    import torch
    from transformers import AutoTokenizer

    from potstill.edges.sampling import stops_of

    shape = shape_of(job["shape"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(shape, "teacher" if job["shape"] == "real" else "student", 1)
    model = model.to(device, torch.bfloat16 if job["precision"] == "bf16" else torch.float32).eval().requires_grad_(False)
    if job["shape"] != "real":
        model.generation_config.eos_token_id = [*range(0, shape["vocab"], MEAN)]
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    stops = stops_of(model, tokenizer, [])
    prompts = [prompt for prompt, _ in json.loads((Path(job["folder"]) / "rows.json").read_text())]
    answer = (ours if job["engine"] == "potstill" else plain)(model, tokenizer, stops)
    answer(prompts[:2], 1, 2)
    memory, begun = Memory(), time.perf_counter()
    lengths = answer(prompts[: max(1, job["answers"] // job["group"])], job["group"], job["max_new_tokens"])
    synchronize(device)
    return {
        "seconds": time.perf_counter() - begun,
        "bytes": memory.above(),
        "tokens": sum(lengths),
        "answers": len(lengths),
        "longest": max(lengths),
    }


def ours(model: Any, tokenizer: Any, stops: list[int]) -> Answer:
    from potstill.data.rollout import Asked, Sampling
    from potstill.rollouts.local import Local

    engine = Local(model, tokenizer, stops)

    def answer(prompts: list[list[int]], group: int, new: int) -> list[int]:
        found = engine([Asked(tuple(ids)) for ids in prompts], group, Sampling(max_new_tokens=new), SEED)
        return [len(one.ids) for one in found]

    return answer


def plain(model: Any, tokenizer: Any, stops: list[int]) -> Answer:
    import torch

    def answer(prompts: list[list[int]], group: int, new: int) -> list[int]:
        torch.manual_seed(SEED)
        rows = [ids for ids in prompts for _ in range(group)]
        width = max(map(len, rows))
        ids_BT = torch.tensor([[stops[0]] * (width - len(ids)) + ids for ids in rows]).to(model.device)
        mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]).to(model.device)
        with torch.inference_mode():
            out_BT = model.generate(
                ids_BT,
                attention_mask=mask_BT,
                max_new_tokens=new,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=stops,
                pad_token_id=stops[0],
            )
        ends = frozenset(stops)
        answers = out_BT[:, width:].tolist()
        return [next((n for n, token in enumerate(row, 1) if token in ends), len(row)) for row in answers]

    return answer


def report(rounds: list[dict[Any, dict[str, Any]]], engines: list[str], groups: list[int]) -> dict[str, Any]:
    """Print the table; the same in numbers."""
    found: dict[str, Any] = {name: {} for name in ("tokens_per_s", "tokens_per_answer", "bytes", "speedup", "memory_ratio")}
    own, peer = ENGINES
    lines = []
    for group in groups:
        of = {engine: [turn[engine, group] for turn in rounds] for engine in engines}
        speed = {engine: [each["tokens"] / each["seconds"] for each in of[engine]] for engine in engines}
        length = {
            engine: sum(one["tokens"] for one in each) / sum(one["answers"] for one in each) for engine, each in of.items()
        }
        size = {engine: [each["bytes"] for each in of[engine]] for engine in engines}
        faster, smaller = [], []
        if own in engines and peer in engines:
            faster = [mine / theirs for mine, theirs in zip(speed[own], speed[peer], strict=True)]
            smaller = [mine / max(theirs, 1) for mine, theirs in zip(size[own], size[peer], strict=True)]
            found["speedup"][str(group)] = {peer: spread(faster)}
            found["memory_ratio"][str(group)] = {peer: spread(smaller)}
        found["tokens_per_s"][str(group)] = {engine: spread(values) for engine, values in speed.items()}
        found["tokens_per_answer"][str(group)] = {engine: round(value, 2) for engine, value in length.items()}
        found["bytes"][str(group)] = {engine: spread(values) for engine, values in size.items()}
        for engine in engines:
            first = of[engine][0]
            lines.append(
                [
                    f"{engine}, group {group}",
                    shown(speed[engine], 0),
                    f"{first['answers']:,}",
                    f"{length[engine]:.1f} (longest {first['longest']:,})",
                    shown([each / 1e9 for each in size[engine]]),
                    f"{shown(faster, 1)}× at {shown(smaller, 2)} of its memory" if engine == own and faster else "",
                ]
            )
    table(["engine", "tokens/s", "answers", "tokens per answer", "GB above the model", "faster by"], lines)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small shape, two rounds")
    parser.add_argument("--shape", choices=ANSWERS, default="quick", help="real: SmolLM2; tiny: for tests")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="JSON lines: instruction, response, context; default: primer")
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 8], help="answers of each prompt")
    parser.add_argument("--answers", type=int, help="answers in all; default: by shape")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer; default: by shape")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: the weights are in bfloat16")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    add_output(parser)
    words = parser.parse_args()
    if words.one:
        print(json.dumps(measure(json.loads(words.one))))
        return
    shape, answers = words.shape, words.answers or ANSWERS[words.shape]
    where = model_of(shape)
    if uneven := [group for group in words.groups if group < 1 or answers % group]:
        raise SystemExit(f"{answers} answers do not divide into groups of {uneven[0]}; set --answers or --groups")
    with tempfile.TemporaryDirectory() as folder:
        run = Run(answers // min(words.groups), 1, MAX_TOKENS[shape])
        prepare(Path(folder), words.rows, shape_of(shape)["vocab"], run, where)
        job = {
            "shape": shape,
            "folder": folder,
            "tokenizer": f"{folder}/tokenizer",
            "answers": answers,
            "max_new_tokens": words.max_new_tokens or NEW[shape],
            "precision": words.precision,
        }
        one = runner(__file__, measure, words.here)
        names = [(engine, group) for group in words.groups for engine in words.engines]
        rounds = in_turn(names, words.rounds or 2, lambda name: one({**job, "engine": name[0], "group": name[1]}))
    found = {**job, **report(rounds, words.engines, words.groups), **facts()}
    every = [{f"{engine}, group {group}": each for (engine, group), each in turn.items()} for turn in rounds]
    hand_over({name: value for name, value in found.items() if name not in ("folder", "tokenizer")}, every, words)


if __name__ == "__main__":
    main()
