"""What the scripts of peers share: they read one job, quantise, and write the weights that the packed file stands for.

A script knows nothing of potstill, because it runs where the peer lives. Its only argument is a job as JSON: `model` (a folder
that transformers loads), `rows` (a JSON file of rows of token ids), `setting` (a key of its SETTINGS) and `out` (an
empty folder). Into `out` it writes `weights.safetensors`, a `NAME.weight` [out, in] for each quantised layer, and `found.json`.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any


class Used:
    """Wall and processor seconds (of child processes too), and peak memory above what was there, while inside."""

    def __enter__(self) -> "Used":
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        except OSError:
            print("no peak of this part alone on this system", file=sys.stderr)
        self._resident, self._processor, self._begun = _status("VmRSS"), processor_seconds(), time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.processor_seconds = time.monotonic() - self._begun, processor_seconds() - self._processor
        self.memory_bytes = _status("VmHWM") - self._resident


def processor_seconds() -> float:
    return sum(os.times()[:4])


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"/proc/self/status has no {name}"
    return int(found[1]) * 1024


Quantise = Callable[[str, list[list[int]], Mapping[str, Any], Path], tuple[Used, dict[str, Any], int]]
GPTQ_PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")


def run(package: str, quantise: Quantise, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Do the job that the command line names.

    Args:
        quantise: given the model's folder, the rows, the setting and a folder to write to, gives what quantising used, weights
            by name, and the bits that the packed layers take in the peer's own file.
    """
    import torch
    from safetensors.torch import save_file

    job = json.loads(sys.argv[1])
    out, rows = Path(job["out"]), json.loads(Path(job["rows"]).read_text())
    used, tensors, bits = quantise(job["model"], rows, settings[job["setting"]], out / "packed")
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, str(out / "weights.safetensors"))
    weights = sum(tensor.numel() for tensor in tensors.values())
    found = {
        "seconds": used.seconds,
        "processor_seconds": used.processor_seconds,
        "memory_bytes": used.memory_bytes,
        "bits": bits / weights,
        "versions": {name: version(name) for name in (package, "torch", "transformers")},
        "threads": torch.get_num_threads(),
    }
    (out / "found.json").write_text(json.dumps(found))


def stored_bits(folder: Path, parts: tuple[str, ...]) -> int:
    """Of the tensors in a folder's safetensors files whose names end in one of the parts."""
    found = (tensor for name, tensor in _tensors(folder).items() if name.endswith(parts))
    return sum(tensor.numel() * tensor.element_size() * 8 for tensor in found)


def read_gptq(folder: Path) -> dict[str, Any]:
    """The weights that files of the format `gptq` (its first version) stand for: scale · (code − 8), symmetric.

    An int32 holds eight codes of one output, inputs in a row, the lowest bits first. The zero point 8 is stored as 7.

    Raises:
        SystemExit: a zero point is another.
    """
    import torch

    file, shifts, weights = _tensors(folder), torch.arange(0, 32, 4), {}
    for name in (name.removesuffix(".qweight") for name in file if name.endswith(".qweight")):
        if ((file[f"{name}.qzeros"][..., None] >> shifts) & 15 != 7).any():
            raise SystemExit(f"{name}: its zero points are not those of symmetric codes")
        codes_PEO = (file[f"{name}.qweight"][:, None, :] >> shifts[:, None]) & 15
        codes_OI, scales_GO = codes_PEO.flatten(0, 1).T - 8, file[f"{name}.scales"].float()
        weights[f"{name}.weight"] = codes_OI * scales_GO[file[f"{name}.g_idx"].long()].T
    return weights


def _tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(str(path)).items()}
