"""Several processes as torchrun starts them: who we are, waiting for one another, and how the whole ends when one fails.

Everything is a no-op in one process, where no process group is opened. Training speaks over the default group;
everything else goes over a second one on the processors, where a rank may wait for hours while the first one evaluates.
"""

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from potstill.core.errors import Interrupted, UserError

T = TypeVar("T")
TRAINING_TIMEOUT = timedelta(minutes=30)  # one step apart, at most
WAITING_TIMEOUT = timedelta(days=7)
SAVING_S = 120  # from Ctrl-C until a process that has not saved is killed


@dataclass(frozen=True)
class _Joined:
    """What `joined` opened: the key-value store that all processes share, and the group to wait in."""

    store: Any
    waiting: Any


_state: list[_Joined] = []
_met = False  # whether this process has ever met others


def world() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1  # clusters set the other names, too


def rank() -> int:
    return int(os.environ["RANK"]) if world() > 1 else 0


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def several() -> bool:
    """Whether this process works together with others."""
    return bool(_state)


def met() -> bool:
    """Whether this process works together with others, or did: how its work ends is then no longer its own affair."""
    return _met


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes. Nothing happens in one process, or inside another `joined`.

    The first process that fails leaves word in the store, which lives as long as torchrun; those that fail after it, mostly
    because it is gone, then keep quiet. So no failure needs the others' cooperation, and a user reads of it once.

    Raises:
        UserError: also when another process died without a word.
    """
    if world() == 1 or _state:
        yield
        return
    import torch.distributed as dist

    global _met
    _met = True
    _state.append(_join())
    with suppress(ValueError):  # not the main thread
        # torchrun sends this to all when one has failed, which must not cut off the one that is about to say why; unlike a
        # handler of ours, it is kept to the interpreter's very end
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        _take_gpu()
        yield
        dist.destroy_process_group()
    except (UserError, Interrupted, KeyboardInterrupt) as error:
        if _is_first_to_fail():
            raise
        raise SystemExit(2 if isinstance(error, UserError) else 130) from None
    except Exception as error:
        if not _is_first_to_fail():
            raise SystemExit(1) from None
        if not _is_lost(error):
            raise
        raise UserError(
            f"process {rank()} of {world()} lost another one, which was killed, ran out of memory, or cannot be reached "
            f"({_words(error)}); what was finished and the last checkpoint are kept: "
            "run the same command again to go on"
        ) from error
    finally:
        _state.clear()


def _join() -> _Joined:
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, number, count = next(rendezvous("env://", timeout=TRAINING_TIMEOUT))
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TRAINING_TIMEOUT)
    return _Joined(PrefixStore("potstill", store), dist.new_group(backend="gloo", timeout=WAITING_TIMEOUT))


def _take_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= there:
            raise UserError(f"process {rank()} is number {local + 1} on a machine of {there} GPUs; start fewer on each")
        torch.cuda.set_device(local)  # what "cuda" means from here on


def _is_first_to_fail() -> bool:
    try:
        return _state[0].store.add("failed", 1) == 1
    except Exception:  # the store is gone with the machine that held it: better said twice than never
        return True


def _is_lost(error: Exception) -> bool:
    """Whether a collective failed, rather than our own code; gloo says so in words only."""
    import torch.distributed as dist

    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def _words(error: Exception) -> str:
    """What a collective's error says, without the line of C++ before it and the guesses after it."""
    return re.sub(r"^\[\S+:\d+\] ", "", str(error).strip().splitlines()[-1]).split(". ")[0][:160]


def waiting_group() -> Any:
    """The group to wait in; None in one process."""
    return _state[0].waiting if _state else None


def gathered(value: T) -> list[T]:
    """Every process's value, by rank."""
    if not _state:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value, group=waiting_group())
    return values


def barrier() -> None:
    """Wait until every process is here."""
    gathered(None)


def on_first(work: Callable[[], T]) -> T:
    """Do something in the first process while the others wait, and give all of them its result, or its failure."""
    if not _state:
        return work()
    import torch.distributed as dist

    outcome: list[Any] = [None, None]
    if first():
        try:
            outcome[0] = work()
        except (UserError, Interrupted) as error:
            outcome[1] = (Interrupted if isinstance(error, Interrupted) else UserError)(str(error))
    dist.broadcast_object_list(outcome, src=0, group=waiting_group())
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def launch(command: list[str], processes: int) -> int:
    """Start a script, or `--module` and its name, with its arguments in so many processes on this machine, as torchrun does.

    Returns their exit status, 2 or 130 where one of them ended so; torchrun itself always ends with 1, under a page of its
    own about it.
    """
    import logging

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    logging.disable(logging.ERROR)  # what the processes have to say they say themselves
    options = ["--standalone", "--nproc-per-node", str(processes), "--shutdown-timeout", str(SAVING_S)]
    try:
        run.run(run.parse_args([*options, *command]))
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        return next((code for code in (2, 130) if code in codes), 1)  # of those that were killed nothing is known
    except SignalException:
        return 130
    return 0
