"""Distributed compression: ranks, devices and collectives of the processes that share one run.

`accelerate launch` and `torchrun` start the same program several times.  Each process then runs its share of the
calibration sequences through every layer; sums over tokens are reduced, so that all processes make the same decisions
and hold the same layer afterwards.  Rank 0 alone writes, prints and holds the lock on the output folder.
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
from .torch_state import default_device


__all__ = ["ALONE", "ProcessFailed", "Processes", "joined_processes"]

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # the others wait while rank 0 downloads; if a process ends, they notice at once
FAILED = "optimum_dern/failed"
COLLECTIVES = {"cuda": "nccl", "xpu": "xccl"}  # the backend of each kind of GPU
LAUNCHERS = {  # environment variables of the rank and of the local rank
    "RANK": "LOCAL_RANK",  # torchrun, accelerate launch
    "SLURM_PROCID": "SLURM_LOCALID",
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "PMI_RANK": "MPI_LOCALRANKID",
}


class ProcessFailed(ConnectionError):
    """Another process of the run has failed or does not respond."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run from the view of one of them; by default a single process without communication.

    Reduced or broadcast tensors are the same to the bit in every process.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")  # where this one computes
    store: dist.Store | None = None  # shared key-value store; may outlive a failed process

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the process that writes and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's share of the items: every `count`-th.

        Raises:
            ValueError: fewer items than processes.
        """
        if len(items) < self.count:
            raise ValueError(
                f"{self.count} processes cannot share {len(items)} calibration batches; start at most {len(items)} "
                "processes, lower batch_size if one is given, or raise num_samples"
            )
        return items[self.rank :: self.count]

    @property
    def reduce(self) -> Reduce:
        """The function that reduces a tensor over all processes."""
        return alone if self.count == 1 else self._reduce_all

    def total(self, number: int) -> int:
        """Add up a whole number over all processes; a single process asks no GPU for it."""
        return number if self.count == 1 else int(self.reduce(torch.tensor(number, device=self.device)))

    def _reduce_all(self, local: Tensor, operation: str = "sum") -> Tensor:
        local = local.contiguous()
        _talk(dist.all_reduce, local, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[operation])
        return local

    def map(self, function: Callable[[int], tuple[Tensor, ...]], items: Iterable[int]) -> Iterator[tuple[Tensor, ...]]:
        """Apply a function to items like the builtin `map`, with the calls distributed over the processes."""
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
        """Call a function in rank 0 only, and return its result in every process.

        Raises:
            ProcessFailed: in the other processes, if the function raises in rank 0.
        """
        if self.count == 1:
            return function()
        outcome: list[Any] = [None, None]
        try:
            if self.is_main:
                outcome[0] = function()
        except Exception as error:
            self.is_first_to_fail()  # before the others are notified
            _talk(dist.broadcast_object_list, [None, str(error)])
            raise
        _talk(dist.broadcast_object_list, outcome)
        if outcome[1] is not None:
            raise ProcessFailed(f"process 0 of the run has failed: {outcome[1]}")
        return outcome[0]

    def main_first(self, function: Callable[[], T]) -> T:
        """Call a function in every process, in rank 0 before the others, and return each process's own result."""
        results: list[T] = []
        self.on_main(lambda: results.append(function()))
        return results[0] if self.is_main else function()

    def is_first_to_fail(self) -> bool:
        """Return whether this process is the first to fail, and so the one to report the error."""
        if self.store is None:
            return True
        try:
            return self.store.compare_set(FAILED, "", str(self.rank)) == str(self.rank).encode()
        except RuntimeError:  # the store ended with the process that hosted it
            return True


ALONE = Processes()
_joined: ContextVar[Processes] = ContextVar("joined")  # set by `joined_processes`, for nested calls


@contextmanager
def joined_processes(device: str | None = None, timeout: timedelta = TIMEOUT) -> Iterator[Processes]:
    """Join the processes that a launcher has started into a process group, until the context exits.

    Args:
        device: "cpu", or "cuda" or "xpu", where each process uses its own GPU; by default a GPU where there is one.
            A single process may name any device.
        timeout: how long to wait for a process that is running but does not respond.

    Yields:
        The processes; a process group that the caller has already initialised is reused.

    Raises:
        ValueError: a device that several processes cannot share, or too few GPUs.
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
    backend = "gloo" if own.type == "cpu" else f"cpu:gloo,{own.type}:{COLLECTIVES[own.type]}"
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
    """Return the device of a process: with several processes on GPUs, the GPU of its local rank."""
    own = default_device(device)
    if count == 1 or own.type == "cpu":
        return own
    if own.type not in COLLECTIVES or own.index is not None:
        kinds = " or ".join(COLLECTIVES)
        raise ValueError(
            f"{count} processes cannot share the device {device!r}; give cpu, or {kinds} for one GPU each"
        )
    local, there = _local_rank(rank), torch.get_device_module(own).device_count()
    if local >= there:
        raise ValueError(
            f"this machine has {there} GPUs and was given a process with the number {local}; "
            "start at most one process a GPU, or compute on the cpu"
        )
    return torch.device(own.type, local)


def _local_rank(rank: int) -> int:
    """Return the local rank of a process, from the environment variables of its launcher."""
    for name, local in LAUNCHERS.items():  # of another launcher, such as an enclosing batch job, the rank may differ
        if local in os.environ and os.environ.get(name, str(rank)) == str(rank):
            return int(os.environ[local])
    raise ValueError(
        f"process {rank} of the run has no LOCAL_RANK, so nobody knows which GPU of its machine is its own; start it "
        "with torchrun, accelerate launch, srun or mpirun, set LOCAL_RANK, or compute on the cpu"
    )


def _current(device: torch.device) -> AbstractContextManager:
    """Make a GPU the current one until the context exits."""
    numbered = device.type in COLLECTIVES and device.index is not None
    return torch.get_device_module(device).device(device) if numbered else nullcontext()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars and warnings in processes other than rank 0 until the context exits."""
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
    """Call a function of `torch.distributed`; raise its connection errors as `ProcessFailed`."""
    try:
        return collective(*args, **kwargs)
    except RuntimeError as error:
        # Gloo's transport errors have no exception class of their own; only the file name in the message tells.
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        reason = str(error).splitlines()[0].partition(". This is")[0]  # without gloo's guesses
        raise ProcessFailed(
            f"another process of the run has ended or does not answer ({reason}); the layers that are finished stay: "
            "mend what has stopped it, and the same command goes on from there"
        ) from error
