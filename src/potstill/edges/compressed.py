"""Folders in the format compressed-tensors, which transformers loads where the package of that name is installed."""

import contextlib
import io
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from potstill.core.artifact import read_json
from potstill.core.errors import UserError
from potstill.edges.hub import library
from potstill.edges.models import Model, device

PACKAGE = "compressed_tensors"
INSTALL = "pip install compressed-tensors"


def is_compressed(folder: Path) -> bool:
    """Whether a folder's config.json says that its weights are in this format."""
    try:
        told = read_json(folder / "config.json")
    except UserError:  # said where the folder is opened
        return False
    told = told.get("quantization_config") if isinstance(told, dict) else None
    return isinstance(told, dict) and told.get("quant_method") == "compressed-tensors"


def loader_problem() -> str | None:
    """Why there is no loader, and the remedy; None where there is."""
    return None if find_spec(PACKAGE) is not None else f"the package compressed-tensors is not here; {INSTALL}"


def loader_version() -> str:
    """The release of the package; "" where there is none."""
    try:
        return version("compressed-tensors")
    except PackageNotFoundError:
        return ""


def load_compressed(folder: Path) -> Model:
    """The model of a folder with its weights unpacked, in float32, in which code times scale is exact.

    Raises:
        UserError: transformers does not load it, or weights are missing or left over.
    """
    import torch

    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # the package warns, and draws bars
        warnings.simplefilter("ignore")
        try:
            model, info = library().AutoModelForCausalLM.from_pretrained(
                str(folder), use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
            model = model.to(device()).eval()
            with torch.inference_mode():
                model(torch.zeros(1, 1, dtype=torch.long, device=model.device))  # the first call unpacks
        except Exception as error:  # whatever transformers, the package or torch makes of a damaged file
            told = (str(error) or type(error).__name__).splitlines()[0][:160]
            raise UserError(f"{folder}: transformers does not load it ({told})") from error
    left = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if left:
        raise UserError(f"{folder}: {len(left)} weights are missing or have no place, the first is '{left[0]}'")
    return model
