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
from potstill.edges import ranks
from potstill.train.shards import described, empty_like, load_shards, save_shards
from potstill.train.work import Work

KEPT = 2


class Checkpoints:
    """Writes a checkpoint every so many steps or minutes, keeps the newest two, and restores the newest.

    One process writes one file; of several each writes its shards. Both are safetensors with the same names inside, so that
    any number of processes goes on where any other stopped.
    """

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

        def clear() -> None:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

        ranks.on_first(clear)
        tensors = {f"model.{name}": p.detach().contiguous() for name, p in self._parameters().items()}
        names = {id(p): name for name, p in self._parameters().items()}
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                tensors[f"optim.{key}.{names[id(parameter)]}"] = value.detach().contiguous()
        tensors[f"random.cpu{self._own}"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors[f"random.cuda{self._own}"] = torch.cuda.get_rng_state()
        if ranks.several():
            save_shards(aside, tensors)
        else:
            save_file(tensors, aside / "state.safetensors")
        ranks.on_first(lambda: self._finish(aside, final, state))
        self._saved_at = time.monotonic()

    def _finish(self, aside: Path, final: Path, state: dict[str, Any]) -> None:
        files = sorted(aside.iterdir())
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())  # the older checkpoint goes once this one is on the disk
        if ranks.several():
            state = {**state, "ranks": ranks.world(), "files": {path.name: path.stat().st_size for path in files}}
        write_json(aside / "state.json", state)
        shutil.rmtree(final, ignore_errors=True)
        aside.replace(final)
        for old in self._all()[:-KEPT]:
            shutil.rmtree(old)

    def restore(self) -> dict[str, Any] | None:
        """Load the newest whole checkpoint into model, optimiser and random state; None when there is none."""
        for folder in reversed(ranks.on_first(self._all)):
            if not ranks.several() and (folder / "state.safetensors").exists():
                try:
                    return self._load(folder)
                except (SafetensorError, OSError, ValueError, KeyError):
                    state = None
            else:
                state = self._load_shards(folder)
            if state is not None:
                return state
            self.work.progress.note(f"{self.work.name:<14} {folder.name} is damaged; an older checkpoint is tried")
            if ranks.first():
                shutil.rmtree(folder)
        return None

    def _load_shards(self, folder: Path) -> dict[str, Any] | None:
        """What several processes wrote, or what several are to read; None when it is not whole."""
        found = ranks.on_first(lambda: described(folder))
        if found is None or not {f"model.{name}" for name in self._parameters()} <= found[1].keys():
            return None
        state, shapes = found
        parameters = self._parameters()
        tensors: dict[str, Any] = {f"model.{name}": empty_like(p, *shapes[f"model.{name}"]) for name, p in parameters.items()}
        for key, shape in shapes.items():
            kind, _, rest = key.partition(".")
            if kind == "optim" and (name := rest.partition(".")[2]) in parameters:
                tensors[key] = empty_like(parameters[name], *shape)
        same = state.pop("ranks", 1) == ranks.world()
        state.pop("files", None)
        random = [key for key in shapes if key.startswith("random.") and (key.endswith(self._own) if ranks.several() else True)]
        tensors |= {key: torch.zeros(shapes[key][0], dtype=torch.uint8) for key in random if same}
        load_shards(folder, tensors)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"model.{name}"])
        for key, value in tensors.items():
            if key.startswith("optim."):
                _, average, name = key.split(".", 2)
                self.optimizer.state[parameters[name]][average] = value
        if same and f"random.cpu{self._own}" in tensors:
            torch.set_rng_state(tensors[f"random.cpu{self._own}"])
            if f"random.cuda{self._own}" in tensors and torch.cuda.is_available():
                torch.cuda.set_rng_state(tensors[f"random.cuda{self._own}"])
        else:  # other processes drew other numbers: none of theirs is repeated
            torch.manual_seed(torch.initial_seed() + 1_000_003 * state["step"])
        return state

    @property
    def _own(self) -> str:
        """Random states are each process's own."""
        return f".{ranks.rank()}" if ranks.several() else ""

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
