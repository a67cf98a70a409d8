"""Training state on disk: model, optimiser, counters and random states, whole or absent."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from potstill.core.artifact import write_json
from potstill.train.work import Work

KEPT = 2


class Checkpoints:
    """Writes a checkpoint every so many steps or minutes, keeps the newest two, and restores the newest."""

    def __init__(self, work: Work, model: Any, optimizer: torch.optim.Optimizer) -> None:
        self.work, self.model, self.optimizer = work, model, optimizer
        self.folder = work.folder / "checkpoints"
        self._saved_at = time.monotonic()

    def _all(self) -> list[Any]:
        return sorted(path for path in self.folder.glob("step-*") if not path.name.endswith(".tmp"))

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint."""
        found = self._all()
        return int(found[-1].name.removeprefix("step-")) if found else None

    def due(self, step: int) -> bool:
        """Whether the recipe asks for a checkpoint now."""
        rules = self.work.checkpoint
        if rules.every_steps is not None and step % rules.every_steps == 0:
            return True
        return time.monotonic() - self._saved_at >= 60 * rules.every_minutes

    def save(self, state: dict[str, Any]) -> None:
        """Write aside, then rename, then prune."""
        final = self.folder / f"step-{state['step']:09}"
        aside = final.with_name(final.name + ".tmp")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        tensors = {f"model.{name}": p.detach().contiguous() for name, p in self._parameters().items()}
        names = {id(p): name for name, p in self._parameters().items()}
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                tensors[f"optim.{key}.{names[id(parameter)]}"] = value.detach().contiguous()
        tensors["random.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        save_file(tensors, aside / "state.safetensors")
        with (aside / "state.safetensors").open("rb") as file:
            os.fsync(file.fileno())  # the older checkpoint goes once this one is on the disk
        write_json(aside / "state.json", state)
        shutil.rmtree(final, ignore_errors=True)
        aside.replace(final)
        for old in self._all()[:-KEPT]:
            shutil.rmtree(old)
        self._saved_at = time.monotonic()

    def restore(self) -> dict[str, Any] | None:
        """Load the newest whole checkpoint into model, optimiser and random state; None when there is none."""
        for folder in reversed(self._all()):
            try:
                return self._load(folder)
            except (SafetensorError, OSError, ValueError, KeyError):
                self.work.progress.note(f"{self.work.name:<14} {folder.name} is damaged; an older checkpoint is tried")
                shutil.rmtree(folder)
        return None

    def _load(self, folder: Path) -> dict[str, Any]:
        state = json.loads((folder / "state.json").read_text())
        tensors = load_file(folder / "state.safetensors")
        wanted = {f"model.{name}" for name in self._parameters()}
        if not wanted <= tensors.keys():
            raise KeyError("weights")
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                parameter.copy_(tensors[f"model.{name}"])
                averages = {
                    key.split(".", 2)[1]: value.to(parameter.device)
                    for key, value in tensors.items()
                    if key.startswith("optim.") and key.split(".", 2)[2] == name
                }
                if averages:
                    self.optimizer.state[parameter] = averages
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
        return state

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}
