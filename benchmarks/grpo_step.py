"""Whole GRPO steps: groups of answers, rewards, advantages, loss and update; potstill against TRL.

    python benchmarks/grpo_step.py --quick                           # under four minutes on two cores
    python benchmarks/grpo_step.py --shape real --rows rows.jsonl    # SmolLM2

Each engine runs in a process of its own, in turn, `--rounds` times; ratios are taken round by round. Both have the same
weights, prompts as token ids in the same order, groups of eight, limits, precision and optimiser, sample at temperature 1 from
the whole vocabulary, and learn by DAPO's loss without the group's standard deviation and without a reference, one update per
round. The reward is the mean of an answer's token ids, as a share of the vocabulary: it costs nothing, and differs within every
group, so that potstill, which does not read answers that teach nothing, has none to leave out. They draw other random numbers,
so the answers differ, and what is compared is seconds per generated token; both counts are printed, of tokens generated and of
tokens learned, and the mean reward, which must agree but for sampling. Models with random weights never end an answer by
themselves: a share of their vocabulary counts as ends, so that lengths are uneven as they are in life.

Engines: `potstill` is `fit` as the grpo stage runs it, the log-probabilities of the sampler checked against the trainer's as it
learns. `trl` is TRL's GRPOTrainer without vLLM, evaluation, checkpoints, logging and gradient checkpointing;
`generate` of transformers over the whole batch, padded on the left. `trl_continuous`, left out unless `--engines` names it, is
the same with transformers' continuous batching, which on a CPU is by far the slower way.
"""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from _models import build
from kd_epochs import shape_of
from on_policy_step import MEAN, OPTIM, OWN, SEED, Clock, compare, steps_of

ENGINES = (OWN, "trl", "trl_continuous")
GROUP = 8  # answers to a prompt


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """In this process: seconds, generated tokens and peak bytes of some steps, and the mean reward of all answers."""
    import torch

    folder, shape = Path(job["folder"]), shape_of(job["shape"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    real = job["shape"] == "real"
    model = build(shape, "teacher" if real else "student", 0 if real else 1).to(device).requires_grad_(True)
    if not real:
        model.generation_config.eos_token_id = list(range(0, shape["vocab"], MEAN))
    prompts = [prompt for prompt, _ in json.loads((folder / "rows.json").read_text())]
    with tempfile.TemporaryDirectory() as work:
        return (ours if job["engine"] == OWN else trl)(job, model, prompts, Path(work))


def place(ids: list[int], vocab: int) -> float:
    """Mean of an answer's token ids, as a share of the vocabulary."""
    return sum(ids) / len(ids) / vocab


def ours(job: dict[str, Any], model: Any, prompts: list[list[int]], folder: Path) -> dict[str, Any]:
    import numpy as np
    from transformers import AutoTokenizer

    from potstill.core.progress import Progress
    from potstill.data.store import Counts, TokenStore
    from potstill.losses.policy import Policy, PolicyGradient
    from potstill.rollouts.local import Local
    from potstill.train.grading import Grades
    from potstill.train.groups import Groups, GroupSamples
    from potstill.train.loop import Optim, fit
    from potstill.train.work import Work

    clock, vocab, rewards = Clock(job["steps"]), model.config.vocab_size, []

    class Watched(Progress):
        def update(self, done: int, total: int, what: str = "step", start: int = 0, **figures: str) -> None:
            if what == "step":
                clock.after(done)

    def grade(rows: Any, found: Any) -> Grades:
        values = np.array([[place(answer.ids, vocab)] for answer in found])
        rewards.extend(values[:, 0])
        return Grades(values, np.ones(1), {})

    def judge(rows: Any) -> Any:
        raise AssertionError("with one update a round nothing is judged before it is learned")

    precision = job["precision"]
    optim = Optim(**OPTIM, schedule="constant", steps=job["steps"], batch_size=job["batch_size"], precision=precision)
    samples = GroupSamples(per_prompt=GROUP, max_new_tokens=job["max_new_tokens"])
    work = Work(folder / "work", "grpo", progress=Watched("quiet"))
    store = TokenStore.write(work.folder / "tokens", [(prompt, [0]) for prompt in prompts], Counts(), "rows")
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    engine = Local(model, tokenizer, [tokenizer.eos_token_id], precision=precision)
    objective = PolicyGradient(Policy(cut="counted"), vocab)
    lessons = Groups(
        store, optim, samples, objective, engine, grade, ["place"], judge, SEED, lambda done, total: None, lambda line: None
    )
    clock.start()
    totals = fit(model, store, objective, optim, work, seed=SEED, lessons=lessons, dropout=False)
    counted = {"tokens": totals.generated_tokens, "learned": totals.sampled_tokens}
    return {**clock.found, **counted, "reward": float(np.mean(rewards))}


def trl(job: dict[str, Any], model: Any, prompts: list[list[int]], folder: Path) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from potstill.data.batches import Order

    clock, tokens, rewards = Clock(job["steps"]), [], []

    class Observed(GRPOTrainer):
        def _tokenize_prompts(self, prompts: list[str]) -> Any:
            return [by_name[name] for name in prompts], None, {}

    class Watched(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            clock.after(state.global_step)

    def reward(completion_ids: list[list[int]], **named: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        values = [place(ids, model.config.vocab_size) for ids in completion_ids]
        rewards.extend(values)
        return values

    logging.disable(logging.WARNING)
    order = Order(len(prompts), job["batch_size"] // GROUP, SEED)
    rows = [row for step in range(job["steps"]) for row in order.step(step)]
    by_name = {str(n): prompts[row] for n, row in enumerate(rows)}
    config = GRPOConfig(
        num_generations=GROUP,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        loss_type="dapo",
        scale_rewards="none",
        use_transformers_continuous_batching=job["engine"] == "trl_continuous",
        **steps_of(job, model, folder),
    )
    trainer = Observed(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": name} for name in by_name]),
        processing_class=AutoTokenizer.from_pretrained(job["tokenizer"], padding_side="left"),
        callbacks=[Watched()],
    )
    clock.start()
    trainer.train()
    learned = sum(tokens)  # all that is drawn
    return {**clock.found, "tokens": learned, "learned": learned, "reward": sum(rewards) / len(rewards)}


if __name__ == "__main__":
    compare(__doc__, __file__, measure, ENGINES, "reward", "mean reward")
