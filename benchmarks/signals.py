"""What it costs to keep what a teacher said: bytes a token, and how far each kept form is from the teacher itself.

    potstill quickstart
    python benchmarks/signals.py runs/quickstart

Takes a finished run with a `distill` stage and asks its student and teacher about the training rows, before and after
training: the divergence that each form shows the student (`live` is the teacher itself, in float32), the relative error of
the student's gradient, and for the hidden states the KL from the teacher's own distribution to the one read back.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _bench import facts

from potstill.core.artifact import Artifact
from potstill.core.errors import UserError
from potstill.data.batches import Batch, pack
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, instruction_pairs
from potstill.divergences.forward_kl import ForwardKL
from potstill.edges.families import logits_of
from potstill.edges.models import load_model, load_tokenizer
from potstill.losses.distillation import Distillation
from potstill.run.folder import artifacts_of, find_run
from potstill.sources import Source
from potstill.teachers.cache import RowCache
from potstill.teachers.signals import Cached, HiddenForm, Live, TopKForm

KS = (8, 16, 32, 64, 128, 256)


def rows_of(artifact: Artifact, tokenizer: Any, count: int) -> Batch:
    source, prompts = Source.parse(artifact.stage["data"]), Prompts.model_validate(artifact.stage["prompts"])
    examples = sorted(source.examples("train"), key=lambda example: example.key)  # type: ignore[attr-defined]
    pairs = list(instruction_pairs(examples, Renderer(tokenizer, prompts), Counts()))
    chosen = pairs[:: max(1, len(pairs) // count)][:count]
    return pack(sorted(chosen, key=lambda pair: len(pair[0]) + len(pair[1])))


def seen(student: Any, signal: Any, batch: Batch, vocab: int) -> tuple[float, torch.Tensor]:
    """Mean divergence in nats per response token, and the gradient of all weights."""
    student.zero_grad(set_to_none=True)
    loss = Distillation(signal, ForwardKL(), 1.0, 1.0, vocab)(student, batch)
    loss.total.backward()
    gradient = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    return loss.total.item() / len(batch.target_N), gradient / len(batch.target_N)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished run's folder or name")
    parser.add_argument("--rows", type=int, default=256, help="training rows asked about")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--save", type=Path, help="also write that object to a file")
    words = parser.parse_args()
    try:
        artifacts = artifacts_of(find_run(words.run))
    except UserError as error:
        sys.exit(f"error: {error}")
    kd = next((a for a in artifacts.values() if a.kind == "distill"), None)
    if kd is None:
        sys.exit(f"{words.run}: no distill stage there")
    if kd.stage["init"] is not None:
        sys.exit(f"{words.run}: its student is cut out of a model, and what it was before training is not kept")
    by_print = {a.fingerprint: a for a in artifacts.values()}
    parents = {name.partition("@")[0]: by_print[p].folder for name, p in kd.parents.items() if p in by_print}

    def place(ref: str) -> str:
        return f"path:{parents[ref.removeprefix('stage:')]}" if ref.startswith("stage:") else ref

    teacher_where, tokenizer = place(kd.stage["teacher"]), load_tokenizer(f"path:{kd.folder}")
    teacher = load_model(teacher_where).requires_grad_(False)
    batch, vocab = rows_of(kd, tokenizer, words.rows), max(tokenizer.get_vocab().values()) + 1
    forms: dict[str, Any] = {"hidden": HiddenForm(teacher.get_output_embeddings(), logits_of(teacher.config))}
    forms |= {
        f"topk {k}": TopKForm(teacher.get_output_embeddings(), logits_of(teacher.config), k, 1.0, vocab)
        for k in KS
        if k <= vocab
    }
    found: dict[str, Any] = {"run": str(words.run), "vocabulary": vocab, "tokens": len(batch.target_N), "forms": {}}
    said = Live(teacher)(batch)
    kept = said.hidden_ND.bfloat16().float()
    with torch.no_grad():
        exact, read = (F.log_softmax(said.head(h)[:, :vocab], -1) for h in (said.hidden_ND, kept))
        found["hidden_kl"] = ForwardKL()(exact, read).mean().item()
    with tempfile.TemporaryDirectory() as folder:
        for when, where in (("before", place(kd.stage["student"])), ("after", f"path:{kd.folder}")):
            student = load_model(where).train()
            live, gradient = seen(student, Live(teacher), batch, vocab)
            found["forms"].setdefault("live", {"bytes_per_token": 0})[when] = {"kl": live, "gradient_error": 0.0}
            for name, form in forms.items():
                cache = RowCache(Path(folder) / name.replace(" ", "-"), {}, form.width)
                signal = Cached(cache, form, lambda: teacher, ())
                value, other = seen(student, signal, batch, vocab)
                error = ((other - gradient).norm() / gradient.norm()).item()
                told = found["forms"].setdefault(name, {"bytes_per_token": form.width})
                told[when] = {"kl": value, "gradient_error": error}
    print(f"\nthe hidden states read back are {found['hidden_kl']:.1e} nats a token from the teacher itself\n")
    print("| kept | bytes a token | KL shown, before | gradient error | KL shown, after | gradient error |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, told in found["forms"].items():
        cells = [f"{told[when]['kl']:.4f} | {told[when]['gradient_error']:.1e}" for when in ("before", "after")]
        print(f"| {name} | {told['bytes_per_token'] or '–'} | {cells[0]} | {cells[1]} |")
    found |= facts()
    if words.save:
        words.save.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if words.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
