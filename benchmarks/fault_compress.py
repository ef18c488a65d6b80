"""Faults of `compress`: what the machine lacks, what ends the run or one of its processes, and sources that change."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from signal import SIGHUP, SIGINT, SIGKILL, SIGSTOP, SIGTERM

from fault_moments import (
    at_layer,
    at_publication,
    change_source,
    end_by,
    fill_disk,
    limit_files,
    limit_memory,
    limit_size,
)
from fault_runs import Fault, Place


__all__ = ["AGAIN", "CHANGED", "FULL", "RIGHTS", "at", "compress_faults"]

WEIGHTS = "model.safetensors"
AGAIN = "then give the same command again"
FULL = f"free some space there, or choose a folder on another disk, {AGAIN}"
RIGHTS = f"; choose another one, or have its permissions changed, {AGAIN}"
CHANGED = r"(changed|removed) during the run; put the earlier file back .*restart=True, --restart\)"
MOMENTS: dict[str, Callable] = {"at a layer": at_layer, "while files are moved": at_publication}


def at(moment: Callable, action: Callable, *args: object) -> Callable[[Place], object]:
    """Inject something that happens at a moment of the run."""
    return lambda place: moment(partial(action, *args))


def full_disks() -> Iterator[tuple[str, Fault]]:
    """The disk is too small, or somebody fills it during the run."""
    small, large, wider = (partial(Place.mount, options=o) for o in ("size=1m", "size=20m", "remount,size=20m"))
    yield "full disk, at the start", Fault(f"take .* are free: .*{FULL}", before=small, mend=wider, mounts=True)
    for (name, moment), left in zip(MOMENTS.items(), (0, 100_000), strict=True):
        fill = partial(_fill, moment, left)
        yield f"full disk, {name}", Fault(f"No space left .*: .*{FULL}", fill, large, Place.free, mounts=True)


def _fill(moment: Callable, left: int, place: Place) -> None:
    moment(partial(fill_disk, place.disk, left))


def limits() -> Iterator[tuple[str, Fault]]:
    """The process may write no larger files, open no more, or has no more memory."""
    for what, limit, says in (
        ("limit on the size of files", limit_size, f"File too large: .*ulimit -f.*{AGAIN}"),
        ("no descriptor left", limit_files, f"Too many open files: .*ulimit -n.*{AGAIN}"),
        ("no memory left", limit_memory, f"not enough memory .*ulimit -v.*{AGAIN}"),
    ):
        yield f"{what}, at the start", Fault(says, lambda place, limit=limit: limit())
        for name, moment in MOMENTS.items():
            if limit is not limit_memory or moment is at_layer:  # moving files needs next to none
                yield f"{what}, {name}", Fault(says, at(moment, limit))


def signals() -> Iterator[tuple[str, Fault]]:
    """Somebody ends the process."""
    rest = "; what is finished stays, the same command goes on from there"
    for name, moment in MOMENTS.items():
        yield f"SIGINT, {name}", Fault(f"interrupted{rest}", at(moment, end_by, SIGINT), code=128 + SIGINT)
        for signal in (SIGTERM, SIGHUP):
            says = f"ended by {signal.name}{rest}"
            yield f"{signal.name}, {name}", Fault(says, at(moment, end_by, signal), code=128 + signal)
        yield f"SIGKILL, {name}", Fault("", at(moment, end_by, SIGKILL), code=-SIGKILL)


def changed_sources() -> Iterator[tuple[str, Fault]]:
    """Somebody changes the source while it is read."""
    for how in ("replaced", "cut short", "removed"):
        yield f"source {how}, and put back", Fault(CHANGED, partial(_change, WEIGHTS, how), mend=Place.mend_source)
    config = partial(_change, "config.json", "replaced")
    yield "config.json replaced, and put back", Fault(CHANGED, config, mend=Place.mend_source)
    differs = "an unfinished run that differs: weights was .*--restart to start over"
    yield "source replaced for good", Fault(CHANGED, partial(_change, WEIGHTS, "replaced"), again=differs)


def _change(name: str, how: str, place: Place) -> None:
    at_layer(partial(change_source, place.source / name, how))


def several_processes() -> Iterator[tuple[str, Fault]]:
    """One of two processes is killed, or hangs."""
    says = "another process of the run has ended or does not answer .*the same command goes on from there"
    for what, rank, signal in (
        ("first of two processes killed", 0, SIGKILL),
        ("second of two processes killed", 1, SIGKILL),
        ("second of two processes hangs", 1, SIGSTOP),
    ):
        yield what, Fault(says, partial(_end_one, rank, signal), processes=2, ill=rank)


def _end_one(rank: int, signal: int, place: Place) -> None:
    if os.environ["RANK"] == str(rank):
        at_layer(partial(end_by, signal))


READ_ONLY = Fault(
    f"Read-only file system: .*/out{RIGHTS}",
    before=partial(Place.mount, options="ro"),
    mend=partial(Place.mount, options="remount,rw"),
    mounts=True,
)


def compress_faults() -> dict[str, Fault]:
    """All of them, by name."""
    return {
        **dict(full_disks()),
        "read-only output": READ_ONLY,
        **dict(limits()),
        **dict(signals()),
        **dict(changed_sources()),
        **dict(several_processes()),
    }
