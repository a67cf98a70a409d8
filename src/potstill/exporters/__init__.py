"""How a finished model leaves the house. One file per format."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

from potstill.core.component import Component, discover


class Exporter(Component):
    """Writes one model into a folder, in a format that other programs load."""

    @abstractmethod
    def write(self, model: Any, tokenizer: Any, packed: Any, folder: Path) -> list[Path]:
        """Write the files and return them.

        Args:
            model: a transformers causal language model in float32; quantised layers hold their dequantised weights.
            tokenizer: its tokenizer, chat template included.
            packed: `{linear layer's name: quant.Packed}` when the model was quantised, else an empty dict.
            folder: exists and is empty, or holds what other exporters wrote.

        Raises:
            UserError: the format cannot hold this model (architecture, tokenizer, widths); names what and the remedy.
        """


discover(__name__, __path__)
