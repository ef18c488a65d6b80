"""Several processes at one compression: who they are, and what they tell each other.

`accelerate launch` and `torchrun` start the same program several times.  Each process then runs its share of the
calibration sequences through every layer; what they sum up is reduced, so that all take the same decisions and hold
the same layer afterwards.  Rank 0 alone writes, prints and holds the lock on the output folder.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.layer.reduction import Reduce, alone


__all__ = ["ALONE", "ProcessFailed", "Processes", "joined_processes"]

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # the others wait while rank 0 downloads; a process that has ended is noticed at once
FAILED = "optimum_dern/failed"
LAUNCHERS = {  # variables with a process's rank, and with its number on its machine
    "RANK": "LOCAL_RANK",  # torchrun, accelerate launch
    "SLURM_PROCID": "SLURM_LOCALID",
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "PMI_RANK": "MPI_LOCALRANKID",
}


class ProcessFailed(ConnectionError):
    """Another process of the run has failed or does not answer."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them; by default it is alone, and nothing is sent.

    What is reduced or broadcast is the same to the bit in every process.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")  # where this one computes
    store: dist.Store | None = None  # outlives a process that fails, where the launcher keeps it

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items that are this process's: every `count`-th.

        Raises:
            ValueError: too few for every process to get one.
        """
        if len(items) < self.count:
            raise ValueError(
                f"{self.count} processes cannot share {len(items)} calibration batches; start at most {len(items)} "
                "processes, lower batch_size, or raise num_samples"
            )
        return items[self.rank :: self.count]

    @property
    def reduce(self) -> Reduce:
        """Over all processes."""
        return alone if self.count == 1 else self._reduce_all

    def _reduce_all(self, local: Tensor, operation: str = "sum") -> Tensor:
        local = local.contiguous()
        _talk(dist.all_reduce, local, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[operation])
        return local

    def map(self, function: Callable[[int], tuple[Tensor, ...]], items: Iterable[int]) -> Iterator[tuple[Tensor, ...]]:
        """As the builtin, in every process, while each process computes only its share."""
        items = list(items)
        if self.count == 1:
            yield from map(function, items)
            return
        own = [function(item) for item in items[self.rank :: self.count]]
        forms: list[Any] = [None] * self.count
        _talk(dist.all_gather_object, forms, [[(value.shape, value.dtype) for value in values] for values in own])
        for position in range(len(items)):
            turn, owner = divmod(position, self.count)
            if owner == self.rank:
                values, own[turn] = tuple(value.contiguous() for value in own[turn]), None
            else:
                values = tuple(
                    torch.empty(size, dtype=dtype, device=self.device) for size, dtype in forms[owner][turn]
                )
            for value in values:
                _talk(dist.broadcast, value, owner)
            yield values

    def on_main(self, function: Callable[[], T]) -> T:
        """What a function returns in rank 0, in every process; nobody goes on before.

        Raises:
            ProcessFailed: in the other processes, where it raises in rank 0.
        """
        if self.count == 1:
            return function()
        outcome: list[Any] = [None, None]
        try:
            if self.is_main:
                outcome[0] = function()
        except Exception as error:
            self.is_first_to_fail()  # before the others hear of it
            _talk(dist.broadcast_object_list, [None, str(error)])
            raise
        _talk(dist.broadcast_object_list, outcome)
        if outcome[1] is not None:
            raise ProcessFailed(f"process 0 of the run has failed: {outcome[1]}")
        return outcome[0]

    def main_first(self, function: Callable[[], T]) -> T:
        """What a function returns in each process, called in rank 0 before it is called in the others."""
        results: list[T] = []
        self.on_main(lambda: results.append(function()))
        return results[0] if self.is_main else function()

    def is_first_to_fail(self) -> bool:
        """Whether no other process has failed before, so that this one has to tell why."""
        if self.store is None:
            return True
        try:
            return self.store.compare_set(FAILED, "", str(self.rank)) == str(self.rank).encode()
        except RuntimeError:  # the store has gone with the process that kept it
            return True


ALONE = Processes()
_joined: ContextVar[Processes] = ContextVar("joined")  # of the context that has found them; those inside use it too


@contextmanager
def joined_processes(device: str | None = None, timeout: timedelta = TIMEOUT) -> Iterator[Processes]:
    """Find the other processes of a run that a launcher has started, for as long as the context is open.

    Args:
        device: "cpu" or "cuda", of which each process takes its own; by default a GPU where there is one.  A process
            that is alone may name any device.
        timeout: how long to wait for a process that is there and does not answer.

    Yields:
        The processes; a group that the caller has initialised is used as it is.

    Raises:
        ValueError: a device that the processes cannot have each for itself.
        ProcessFailed: the processes cannot find each other.
    """
    if dist.is_available() and dist.is_initialized():
        processes = _joined.get(Processes(dist.get_rank(), dist.get_world_size()))
        own = _own_device(device, processes.rank, processes.count)
        with _current(own):
            yield replace(processes, device=own)
        return
    count = int(os.environ.get("WORLD_SIZE", 1))
    own = _own_device(device, int(os.environ.get("RANK", 0)), count)
    if count == 1:
        yield Processes(device=own)
        return
    store, rank, count = _talk(lambda: next(dist.rendezvous("env://", timeout=timeout)))
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    _talk(dist.init_process_group, backend, store=store, rank=rank, world_size=count, timeout=timeout)
    processes = Processes(rank, count, own, dist.PrefixStore("optimum_dern", store))
    token = _joined.set(processes)
    try:
        with _current(own), nullcontext() if processes.is_main else _quiet():
            yield processes
    finally:
        _joined.reset(token)
        dist.destroy_process_group()


def _own_device(device: str | None, rank: int, count: int) -> torch.device:
    """The device that a process computes on: of several GPUs, the one of its number on this machine."""
    own = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if count == 1 or own.type == "cpu":
        return own
    if own.type != "cuda" or own.index is not None:
        raise ValueError(f"{count} processes cannot share the device {device!r}; give cpu, or cuda for one GPU each")
    local = _local_rank(rank)
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"this machine has {torch.cuda.device_count()} GPUs and was given a process with the number {local}; "
            "start at most one process a GPU, or compute on the cpu"
        )
    return torch.device("cuda", local)


def _local_rank(rank: int) -> int:
    """The number of a process on its machine, by the launcher that has given it its rank.

    Variables with another rank are another launcher's, such as those of the batch script around it.
    """
    for name, local in LAUNCHERS.items():
        if local in os.environ and os.environ.get(name, str(rank)) == str(rank):
            return int(os.environ[local])
    raise ValueError(
        f"process {rank} of the run has no LOCAL_RANK, so nobody knows which GPU of its machine is its own; start it "
        "with torchrun, accelerate launch, srun or mpirun, set LOCAL_RANK, or compute on the cpu"
    )


def _current(device: torch.device) -> AbstractContextManager:
    """Make a GPU the one that CUDA calls without a device mean, for as long as the context is open."""
    return torch.cuda.device(device) if device.type == "cuda" and device.index is not None else nullcontext()


@contextmanager
def _quiet() -> Iterator[None]:
    """Progress bars and warnings are left to rank 0 while the context is open."""
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("optimum_dern")
    levels = logger.level, transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(levels[0])
        transformers_logging.set_verbosity(levels[1])
        if bars:
            transformers_logging.enable_progress_bar()


def _talk(collective: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a function of `torch.distributed`, and tell its errors of the connection as those of another process."""
    try:
        return collective(*args, **kwargs)
    except RuntimeError as error:
        # Gloo has no class of its own for what its transport reports, only the file that it names.
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        raise ProcessFailed(
            f"another process of the run has ended or does not answer ({str(error).splitlines()[0]}); the layers that "
            "are finished stay: mend what has stopped it, and the same command goes on from there"
        ) from error
