"""What is done to a run from within its process, and when: limits, signals, a full disk, a source that changes."""

import functools
import itertools
import os
import resource
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from optimum_dern.checkpoint.source.loader import PartLoader
from optimum_dern.engine.run import checkpoint
from optimum_dern.machine import processes


__all__ = [
    "at_call",
    "at_layer",
    "at_publication",
    "change_source",
    "end_by",
    "fill_disk",
    "free_port",
    "join",
    "limit_files",
    "limit_memory",
    "limit_size",
]

Action = Callable[[], object]
BLOCK = 1 << 14
HELD: list[bytearray] = []  # memory that is used up


def at_layer(action: Action, position: int = 1) -> None:
    """Act when a decoder layer is loaded for the first time; those before it are finished by then."""
    loaded, todo = PartLoader.loaded, [action]

    @functools.wraps(loaded)
    def acting(self, now, *tensors):
        if now == position and todo:
            todo.pop()()
        return loaded(self, now, *tensors)

    PartLoader.loaded = acting


def at_call(owner: Any, name: str, action: Action, number: int = 0) -> None:
    """Act before a function of a module or class is called, the time of this number, counted from 0."""
    function, calls = getattr(owner, name), itertools.count()

    @functools.wraps(function)
    def acting(*args, **kwargs):
        if next(calls) == number:
            action()
        return function(*args, **kwargs)

    setattr(owner, name, acting)


def at_publication(action: Action) -> None:
    """Act when all is computed, and files are about to be moved into place."""
    copy = checkpoint.copy_companions
    checkpoint.copy_companions = lambda *args: (action(), copy(*args))


def end_by(number: int) -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), number)


def limit_files() -> None:
    """Let this process open no file more."""
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, free))


def limit_memory() -> None:
    """Give this process no more addresses than it has, and use up what its allocator holds in store of them."""
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[0])
    limit = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with suppress(MemoryError):
        while True:
            HELD.append(bytearray(BLOCK))


def limit_size(largest: int = 1 << 16) -> None:
    """Let this process write no file larger than so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


def fill_disk(disk: Path, left: int = 0) -> None:
    """Fill a disk up to some bytes with a file, as somebody else may do during a run."""
    room = os.statvfs(disk)
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - left)


def change_source(file: Path, how: str) -> None:
    """Replace a file by another of its size, cut it, or remove it; the earlier one stays beside it as `.kept`."""
    content = file.read_bytes()
    file.rename(file.with_name(f"{file.name}.kept"))
    if how == "replaced":
        file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    elif how == "cut short":
        file.write_bytes(content[: len(content) // 2])


def free_port() -> int:
    """Find a port where the processes of a run can meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join(rank: int, count: int, port: int, seconds: float = 3.0) -> None:
    """Make this process one of several that share a run, which wait at most so many seconds for one another."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in meeting.items()}
    wait = timedelta(seconds=seconds)
    processes.joined_processes = functools.partial(processes.joined_processes, timeout=wait)
