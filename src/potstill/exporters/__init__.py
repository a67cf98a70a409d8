"""How a finished model leaves the house. One file per format."""

import tempfile
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potstill.core.component import Component, discover
from potstill.core.errors import UserError
from potstill.edges.codes import bits_in, check_codes


class Exporter(Component):
    """Writes one model into a folder, in a format that other programs load."""

    def problems(self, config: Any, tokenizer: Any, *, quantised: int) -> list[str]:
        """Why `write` would refuse a model, as far as its config and tokenizer tell; empty where they tell nothing.

        Args:
            config: the transformers config of the model.
            tokenizer: its tokenizer.
            quantised: bits of the codes that the model will come with; 0: it comes with none.
        """
        return []

    def holds(self, stored: str, *, quantised: int) -> dict[str, str]:
        """The files of weights that `write` will make, by name, and the type that its matrices have in each.

        Args:
            stored: the type of the model's weights as they are kept, such as "float32".
        """
        return {}

    def write(self, model: Any, tokenizer: Any, packed: Mapping[str, Any], folder: Path, *, name: str = "") -> list[Path]:
        """Write the files and return them. They appear in the folder when all are whole; on an error none does.

        Args:
            model: a transformers causal language model; quantised layers hold their dequantised weights.
            tokenizer: its tokenizer, chat template included.
            packed: `{linear layer's name: quant.Packed}` when the model was quantised, else an empty dict.
            folder: exists and is empty, or holds what other exporters wrote.
            name: what people call the model.

        Raises:
            UserError: `problems` finds some; weights are NaN or infinite, not what the codes stand for, or outside the
                format's range.
        """
        problems = self.problems(model.config, tokenizer, quantised=bits_in(packed))
        if problems:
            raise UserError("\n".join(problems))
        check_finite(model)
        check_codes(model, packed)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as aside:
            files = self.write_files(model, tokenizer, packed, Path(aside), name)
            return [_moved(file, Path(aside), folder) for file in files]

    @abstractmethod
    def write_files(self, model: Any, tokenizer: Any, packed: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
        """Write the files into an empty folder and return them; called by `write`, whose arguments are checked.

        Raises:
            UserError: a weight is outside the format's range.
        """


def check_finite(model: Any) -> None:
    """Refuse NaN and infinity.

    Raises:
        UserError: names the first weight that holds one.
    """
    for name, parameter in model.named_parameters():
        if not parameter.detach().isfinite().all():
            raise UserError(f"the weight '{name}' holds NaN or infinity; export a checkpoint from before training diverged")


def _moved(file: Path, aside: Path, folder: Path) -> Path:
    target = folder / file.relative_to(aside)
    target.parent.mkdir(parents=True, exist_ok=True)
    return file.replace(target)


discover(__name__, __path__)
