"""GRPO's loss and gradient against TRL's GRPOTrainer, on the same answers: 1.16, where it is installed."""

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from enumerated import PROMPT, World, gradient, moved, rows_of
from torch import Tensor

from potstill.data.batches import SHARE, step_batches
from potstill.losses.judging import ADVANTAGE
from potstill.losses.policy import Policy, PolicyGradient, advantages, shares
from potstill.teachers.signals import Live

LONGEST = 3
REWARDS = np.array([[1.0, 0.0, 0.3], [0.2, 0.2, 0.9]])
WAYS = {  # ours; TRL's loss_type and importance_sampling_level
    "deepseek": ({"preset": "deepseek"}, "grpo", "token"),
    "dapo": ({"preset": "dapo"}, "dapo", "token"),
    "dr_grpo": ({"preset": "dr_grpo"}, "dr_grpo", "token"),
    "GSPO": ({"ratio": "sequence_mean", "normaliser": "sequence", "group_std": True, "beta": 0.04}, "grpo", "sequence"),
    "tight": ({"preset": "deepseek", "eps_low": 0.02, "eps_high": 0.05}, "grpo", "token"),
}


@pytest.fixture(scope="module")
def trainer() -> Any:
    pytest.importorskip("trl", reason="needs trl: pip install 'potstill[bench]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer.grpo_trainer import GRPOTrainer
    return GRPOTrainer


@pytest.fixture(scope="module")
def world() -> World:
    return World(vocab=4, longest=LONGEST)


def padded(rows: list[Any], fill: float = 0.0) -> Tensor:
    tensors = [torch.as_tensor(np.asarray(row, dtype=np.float64)) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)


def logps(model: Any, ids_BT: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
    """What TRL's own method gives, from a plain forward pass with answers padded on the right."""
    logits_BTV = model(ids_BT).logits[:, len(PROMPT) - 1 : -1]
    log_BTV = F.log_softmax(logits_BTV, dim=-1)
    answers_BT = ids_BT[:, len(PROMPT) :]
    return log_BTV.gather(-1, answers_BT[..., None]).squeeze(-1), -(log_BTV.exp() * log_BTV).sum(-1), None


def theirs(
    trainer: Any, world: World, now: Any, reference: Any, answers: list[Any], p: Policy, kind: str, level: str
) -> Tensor:
    ids_BT, mask_BT = padded(answers).long(), padded([np.ones(len(y)) for y in answers])
    prompt_BT = torch.tensor([PROMPT] * len(answers))
    every_BT = torch.cat([prompt_BT, ids_BT], dim=1)
    with torch.no_grad():
        old_BT, ref_BT = logps(world.student, every_BT)[0], logps(reference, every_BT)[0]
    # TRL's advantages, as `_generate_and_score_completions` has them
    grouped = torch.tensor(REWARDS)
    found = grouped - grouped.mean(1, keepdim=True)
    if p.group_std:
        found = found / (grouped.std(1, keepdim=True) + 1e-4)
    inputs = {
        "prompt_ids": prompt_BT,
        "prompt_mask": torch.ones_like(prompt_BT),
        "completion_ids": ids_BT,
        "completion_mask": mask_BT.long(),
        "advantages": found.flatten(),
        "old_per_token_logps": old_BT,
        "ref_per_token_logps": ref_BT,
        "num_items_in_batch": mask_BT.sum(),
    }
    itself = SimpleNamespace(
        _get_per_token_logps_and_entropies=logps,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=p.beta,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        loss_type=kind,
        epsilon_low=p.eps_low,
        epsilon_high=p.eps_high,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        max_completion_length=LONGEST,
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction="sum": x),
        _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=True),
        _metrics={"train": __import__("collections").defaultdict(list)},
    )
    return trainer._compute_loss(itself, now, inputs)


def ours(world: World, now: Any, reference: Any, answers: list[Any], p: Policy) -> Tensor:
    rows = rows_of(answers, world.sampler(0.0))
    of = np.concatenate([advantages(reward_G, p.group_std) for reward_G in REWARDS])
    for row, advantage in zip(rows, of, strict=True):
        row.given[ADVANTAGE] = np.full(len(row.response), advantage)  # type: ignore[index]
    judge = PolicyGradient(p, world.vocab, reference=Live(reference) if p.beta else None)
    told = judge.judged(world.student, rows, 10_000).rows
    lengths = [len(row.response) for row in told]
    for row, share in zip(told, shares(lengths, [1.0] * len(told), p.normaliser, len(told), LONGEST), strict=True):
        row.given[SHARE] = np.full(len(row.response), share)  # type: ignore[index]
    objective = PolicyGradient(p, world.vocab)
    return torch.stack([objective(now, batch).total for batch in step_batches(told, 12)]).sum() / sum(lengths)


@pytest.mark.parametrize("by", [0.0, 0.1])
@pytest.mark.parametrize("name", WAYS)
def test_loss_and_gradient_are_those_of_trl(name: str, by: float, world: World, trainer: Any) -> None:
    fields, kind, level = WAYS[name]
    policy, now, reference = Policy.model_validate(fields), moved(world.student, by), moved(world.student, 0.2, seed=8)
    answers = [world.answers[i] for i in (0, 1, 11, 30, 2, 39)]
    assert {len(y) for y in answers} == {1, 2, 3}
    other = theirs(trainer, world, now, reference, answers, policy, kind, level)
    own = ours(world, now, reference, answers, policy)
    assert own.item() == pytest.approx(other.item(), rel=1e-9, abs=1e-12)
    one, two = gradient(own, now), gradient(other, now)
    assert torch.allclose(one, two, rtol=1e-9, atol=1e-11)
    assert two.norm() > 1e-3
