"""Who works on a step: one process alone, or several, each with a part of the rows and a shard of the weights (FSDP2).

A step's loss is divided by its response tokens in all processes, which each of them counts for itself, so gradients are
summed, never averaged, and one process and several end with the same weights but for rounding.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from potstill.data.batches import Batch, StepRow, micro_batches, pack, pack_rows, step_batches
from potstill.edges import ranks
from potstill.edges.models import blocks_of, device
from potstill.edges.packed import packs
from potstill.losses.head import Loss
from potstill.losses.objective import Objective

# Gradients up to this size are kept whole between the micro-batches of a step and reduced once; larger ones are reduced
# after each, which costs traffic instead of memory.
WHOLE_GRADIENTS_BYTES = 4 << 30

Asked = Callable[[], tuple[bool, bool]]  # whether to stop, whether a checkpoint is due


class Team(Protocol):
    """What the loop asks of the processes that share its steps."""

    def batches(self, rows: Sequence[StepRow], max_tokens: int) -> Iterator[Batch]:
        """This process's micro-batches of a step."""
        ...

    def loss(self, batch: Batch) -> Loss:
        """The objective on one of them."""
        ...

    def agree(self, sums: dict[str, float], asked: Asked) -> tuple[dict[str, float], Asked]:
        """The step's sums over all processes, and what all of them are asked: one says stop, the first says save."""
        ...

    def clip(self, limit: float) -> float:
        """Scale the gradients down to a norm; the norm they had."""
        ...


def team_of(model: Any, objective: Objective, in_bf16: bool) -> Team:
    """The model is sharded in place when there are several processes."""
    return Sharded(model, objective, in_bf16) if ranks.several() else Alone(model, objective)


class Alone:
    """One process, the model as it is."""

    def __init__(self, model: Any, objective: Objective) -> None:
        self.model, self.objective = model, objective

    def batches(self, rows: Sequence[StepRow], max_tokens: int) -> Iterator[Batch]:
        return step_batches(rows, max_tokens, share=packs(self.model))

    def loss(self, batch: Batch) -> Loss:
        return self.objective(self.model, batch.to(self.model.device))

    def agree(self, sums: dict[str, float], asked: Asked) -> tuple[dict[str, float], Asked]:
        return sums, asked

    def clip(self, limit: float) -> float:
        return float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))


class _Step(nn.Module):
    """The outermost module: embedding and head, read past the model's own `forward`, are whole while this one runs."""

    def __init__(self, model: Any, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.objective(self.model, batch)
        return loss.total, loss.parts


class Sharded:
    """One of several processes."""

    def __init__(self, model: Any, objective: Objective, in_bf16: bool) -> None:
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        self.reduce_each = size > WHOLE_GRADIENTS_BYTES
        _keep_form(model)
        # Under autocast a block's weights would live on as bfloat16 copies until backward; gathered as bfloat16 they are
        # freed after the block. Its inputs stay as they are, so that the residual stream keeps float32.
        narrow = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        mesh = _mesh()
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh, mp_policy=narrow if in_bf16 else MixedPrecisionPolicy())
        self.model = model
        self.step: Any = fully_shard(_Step(model, objective), mesh=mesh)
        for module in self.step.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # or the factor would ask for an operation that gloo lacks

    def batches(self, rows: Sequence[StepRow], max_tokens: int) -> Iterator[Batch]:
        parts = shares([len(row) for row in rows], ranks.world())
        groups = [list(micro_batches([len(rows[i]) for i in part], max_tokens)) if part else [] for part in parts]
        passes = max(map(len, groups))  # every process takes part in every gathering of weights
        mine, own = groups[ranks.rank()], parts[ranks.rank()]
        for n in range(passes):
            self.step.set_requires_gradient_sync(self.reduce_each or n == passes - 1)
            chosen = [rows[own[i]] for i in mine[n]] if n < len(mine) else []
            yield pack_rows(chosen) if chosen else IDLE

    def loss(self, batch: Batch) -> Loss:
        return Loss(*self.step(batch.to(self.model.device)))

    def agree(self, sums: dict[str, float], asked: Asked) -> tuple[dict[str, float], Asked]:
        gathered = ranks.gathered((sums, *asked()))
        total: dict[str, float] = {}
        for theirs, _, _ in gathered:
            for name, value in theirs.items():
                total[name] = total.get(name, 0.0) + value
        answer = any(stop for _, stop, _ in gathered), gathered[0][2]
        return total, lambda: answer

    def clip(self, limit: float) -> float:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm: Any = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of all shards
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return float(norm)


IDLE = pack([([0], [])])  # one token and nothing to learn: the share of a process that has no rows left


def shares(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Indices of a step's rows for each process, about equal in tokens: longest first, each to whoever has least."""
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        least = min(range(count), key=lambda part: (loads[part], part))
        parts[least].append(i)
        loads[least] += lengths[i]
    return [sorted(part) for part in parts]


def _mesh() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device().type, (ranks.world(),))


def shard_frozen(model: Any) -> Any:
    """A teacher's blocks, divided among the processes; its embedding and head, which are read from outside, stay whole."""
    if ranks.several():
        from torch.distributed.fsdp import fully_shard

        mesh = _mesh()
        whole = {model.get_input_embeddings().weight, *model.get_output_embeddings().parameters()}
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model.base_model, mesh=mesh, ignored_params=whole)
    return model


def _keep_form(model: Any) -> None:
    """Before sharding: a copy on the first process's CPU, to be filled by `whole`; ties between weights survive in it."""
    form = None
    if ranks.first():
        memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().cpu().clone(), p.requires_grad) for p in model.parameters()}
        form = copy.deepcopy(model, memo).cpu()
    model._potstill_form = (form,)  # in a tuple: no submodule


@contextmanager
def full_model(model: Any) -> Iterator[Any]:
    """The model to use outside the loop: itself, or a plain copy with all weights in the first process, None in the others.

    All processes must ask. A copy, because generating from shards would gather all weights for every token.
    """
    form = getattr(model, "_potstill_form", None)
    if form is None:
        yield model
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    (plain,) = form
    if plain is None:
        yield None
    else:
        plain.load_state_dict(weights)
        del weights
        yield plain.to(device()).eval()
        plain.cpu()  # off the GPU while training goes on
    ranks.barrier()  # it may have taken longer than a collective of the training group waits
