"""What this machine and its packages are, and how much memory a stage took."""

import ctypes
import gc
import platform
import resource
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = (
    "potstill",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "numpy",
    "rouge-score",
    "gguf",
    "regex",
    "datasketch",
)


BROUGHT_BY_WORK = 250_000_000  # measured, benchmarks/plan.py


@cache
def versions() -> dict[str, str]:
    """Of Python and the packages that a result can depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def machine_facts() -> dict[str, Any]:
    """What a report says of the machine and the packages."""
    import psutil
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": versions(),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": psutil.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": psutil.virtual_memory().total,
            "gpu": gpu,
        },
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def total_memory() -> int:
    """Bytes that this machine has, or that its container may use."""
    import psutil

    total = psutil.virtual_memory().total
    with suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def free_memory(device: Any) -> int:
    """Bytes that could be allocated now on a torch device."""
    import psutil
    import torch

    if device.type != "cuda":
        free = psutil.virtual_memory().available
        with suppress(OSError, ValueError):  # a container's own limit, where it has one
            group = Path("/sys/fs/cgroup")
            free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
        return free
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


@cache
def resting_memory() -> int:
    """Bytes that this process holds without a model: with torch and transformers loaded, measured once before models come, and
    what products and figures bring along once there is work."""
    import psutil
    import torch

    from potstill.edges.hub import library

    library().AutoModelForCausalLM.from_config  # noqa: B018  # pyright: ignore  # what is imported late counts too
    torch.mm(torch.ones(1, 1), torch.ones(1, 1))
    return psutil.Process().memory_info().rss + BROUGHT_BY_WORK


@cache
def float64_rate() -> float:
    """Operations per second of matrix products in float64 on this processor, measured once in some hundredths of a second."""
    import torch

    a_NN = torch.ones(512, 512, dtype=torch.float64)
    taken = []
    for _ in range(4):
        begun = time.perf_counter()
        a_NN @ a_NN  # pyright: ignore[reportUnusedExpression]
        taken.append(time.perf_counter() - begun)
    return 2 * 512**3 / min(taken)


def give_back_memory() -> None:
    """Return freed memory to the system: the C library keeps it otherwise, and a later stage would seem to need it."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc's alone
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Heap:
    """Gives freed memory back when this process has grown by a fifth since its first look.

    Batches differ in their sizes, so the C library's heap is cut into pieces that the next tensors do not fit: in 45 steps of
    Gemma 3 270M a process of 9 GB became one of 17.
    """

    GROWTH, LEAST = 1.2, 256 << 20

    def __init__(self) -> None:
        self._first: int | None = None

    def look(self) -> None:
        """To be called where the process should be as large as it was the last time, such as after every step."""
        import psutil

        now = psutil.Process().memory_info().rss
        if self._first is None:
            self._first = now
        elif now > self.GROWTH * self._first + self.LEAST:
            give_back_memory()


def reset_peak_memory() -> None:
    """Start measuring a stage's peak memory, where the system can; memory of earlier stages is given back first."""
    give_back_memory()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Peak resident memory of this process in bytes, since `reset_peak_memory` where the system can tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_memory() -> int:
    """Peak bytes that torch had allocated on the GPU since `reset_peak_memory`; 0 without one."""
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_allocated() if torch is not None and torch.cuda.is_available() else 0


def bf16_instructions() -> str:
    """By which instructions this processor multiplies in bfloat16, such as "AMX"; "" where torch knows of none."""
    import torch

    known = (("AMX", "_is_amx_tile_supported"), ("AVX512-BF16", "_is_avx512_bf16_supported"))
    return next((name for name, ask in known if getattr(torch.cpu, ask, bool)()), "")
