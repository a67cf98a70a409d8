"""Blocks that are solved already, on disk, so that a run that was killed goes on where it was."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from potstill.core.artifact import write_json
from potstill.core.errors import UserError
from potstill.quant.packed import Packed, load_packed, save_packed


@dataclass(frozen=True)
class LayerError:
    """How one layer was rounded.

    Attributes:
        gptq: `output_error` of the solver's codes against the layer's weights of full precision, whatever they were solved for;
            None where rounding to nearest was asked for.
        rtn: `output_error` of rounding to nearest, on the same Hessian.
        damping: λ that the solver used; None without it.
        made_up: share of what the layers before did wrong that it makes up for.
        dead_columns: inputs that were zero in every calibration row.
        rounded_rows: outputs for which the solver was no better than rounding, which was taken.
        vanished: whether weights that were not zero all became zero.
    """

    gptq: float | None
    rtn: float
    damping: float | None = None
    made_up: float = 0.0
    dead_columns: int = 0
    rounded_rows: int = 0
    vanished: bool = False


@dataclass
class Quantised:
    """What was done to some layers, by their names.

    Attributes:
        packed: the quantised matrices, [out, in], in main memory.
        errors: relative output error of each quantised layer.
        kept: layers left at full precision: their width does not divide into groups, or no batch reached them.
    """

    packed: dict[str, Packed] = field(default_factory=dict)
    errors: dict[str, LayerError] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)

    def error(self, name: str) -> float | None:
        """That of the method that was used; None of a layer that was kept."""
        found = self.errors.get(name)
        return found and (found.rtn if found.gptq is None else found.gptq)

    def add(self, other: "Quantised") -> None:
        """Take in the layers of a further block."""
        self.packed |= other.packed
        self.errors |= other.errors
        self.kept += other.kept


class Finished:
    """A pair of files for each block: its codes, and what is said of them, written last, so that a pair is whole or absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, block: int, done: Quantised) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        codes, about = self._files(block)
        aside = codes.with_suffix(".tmp")
        save_packed(done.packed, aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(codes)
        errors = {name: asdict(error) for name, error in done.errors.items()}
        write_json(about, {"order": list(done.packed), "errors": errors, "kept": done.kept})

    def read(self, block: int) -> Quantised | None:
        """What was written of a block; None where that is nothing, or damaged."""
        codes, about = self._files(block)
        with suppress(OSError, UserError, ValueError, KeyError, TypeError):
            told: Mapping[str, Any] = json.loads(about.read_text(encoding="utf-8"))
            packed = load_packed(codes)
            errors = {name: LayerError(**error) for name, error in told["errors"].items()}
            return Quantised({name: packed[name] for name in told["order"]}, errors, list(told["kept"]))
        return None

    def _files(self, block: int) -> tuple[Path, Path]:
        return self.folder / f"block-{block:04}.safetensors", self.folder / f"block-{block:04}.json"
