"""Where a student ends its own answers, how likely the teacher finds the end: python docs/ends.py STUDENT TEACHER rows.jsonl

Answers to the file's rows are sampled from the student at temperature 1 and cut at 96 tokens; references are cut likewise. Both
models are folders.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch

from potstill.data.prompts import Prompts, Renderer
from potstill.data.rollout import Asked, Sampling
from potstill.data.templates import LeftOut
from potstill.edges.models import load_model, load_tokenizer
from potstill.rollouts.local import Local
from potstill.sources import Source

LONGEST, ROWS = 96, 32


@torch.no_grad()
def log_ends(model: Any, prompt: Sequence[int], answer: Sequence[int], end: int) -> torch.Tensor:
    """log p(end) [R] at each place of an answer."""
    ids = torch.tensor([[*prompt, *answer]])
    return model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)[:, end]


def main(student_at: str, teacher_at: str, rows: str) -> None:
    places = [f"path:{folder}" for folder in (student_at, teacher_at)]
    tokenizer = load_tokenizer(places[0])
    student, teacher = (load_model(where).eval() for where in places)
    renderer = Renderer(tokenizer, Prompts(max_tokens=256, max_prompt_tokens=160))
    source = Source.parse({"kind": "dolly", "path": rows, "share": 0.06, "splits": {"validation": 0.05, "test": 0.2}})
    pairs = []
    for example in list(source.examples("validation"))[:ROWS]:
        try:
            row = renderer.row(example)
        except LeftOut:
            continue
        pairs.append((list(row.prompt), list(row.response)[:LONGEST]))
    engine = Local(student, tokenizer, renderer.stop_ids)
    own = engine([Asked(tuple(prompt)) for prompt, _ in pairs], 1, Sampling(max_new_tokens=LONGEST), 1)
    end = renderer.end_of_turn_id
    for what, answers in (("own answers", [each.ids for each in own]), ("references", [response for _, response in pairs])):
        ended = [(prompt, answer) for (prompt, _), answer in zip(pairs, answers, strict=True) if answer[-1] == end]
        means = [
            sum(float(log_ends(model, prompt, answer, end)[-1]) for prompt, answer in ended) / len(ended)
            for model in (student, teacher)
        ]
        both = f"student {means[0]:.2f}, teacher {means[1]:.2f}"
        print(f"{what}: {len(ended)} of {len(pairs)} end; log-probability of the end: {both}")


if __name__ == "__main__":
    main(*sys.argv[1:])
