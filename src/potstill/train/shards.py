"""Training state of several processes, by torch.distributed.checkpoint, in safetensors: nothing is pickled."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from potstill.edges import ranks

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def save_shards(folder: Path, tensors: dict[str, Any]) -> None:
    """Each process writes its part; what all hold alike is written once.

    Raises:
        OSError: in all processes, when one could not write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(tensors, storage_writer=writer, process_group=ranks.waiting_group())
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def load_shards(folder: Path, tensors: dict[str, Any]) -> None:
    """Fill tensors, sharded or plain, from a folder that one process wrote or several, however many there are now."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process, as asked
            load(tensors, storage_reader=reader, process_group=ranks.waiting_group(), no_dist=not ranks.several())
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def described(folder: Path) -> tuple[dict[str, Any], Shapes] | None:
    """A checkpoint's counters and the shapes it holds; None when it is not whole."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        state = json.loads((folder / "state.json").read_text())
        for name, size in state.get("files", {}).items():  # a lost shard would otherwise be read as zeros
            if (folder / name).stat().st_size != size:
                return None
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
    return state, {name: (tuple(data.size), data.properties.dtype) for name, data in found.items()}  # type: ignore[union-attr]


def empty_like(parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What a stored tensor is read into: sharded as the parameter is where it has its shape."""
    if shape == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(shape, dtype=dtype, device=parameter.device)
