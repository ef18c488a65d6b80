"""How many threads torch computes with: one for every core that is idle at the start.

Threads that wait for one another spin.  On cores that others work on, two of them take up to ten times as long as one
alone; on idle ones the spinning is worth its while.  torch counts all cores of a machine, whoever works on them and
whatever part of them this process may have.
"""

import math
import os
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path


__all__ = ["allowed_cores", "choose_threads", "same_threads"]

SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SPINS = "10000"  # of GNU's OpenMP: no slower than its default on idle cores, and much faster on shared ones
MOMENT = 0.15  # seconds in which the others are watched
PROC, CGROUP = Path("/proc/stat"), Path("/sys/fs/cgroup")


def choose_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have torch, which must not be imported yet, compute with as many threads as there are idle cores.

    Args:
        environment: in which that is set; left as it is where the user has set anything of the kind.
    """
    if not any(name in environment for name in SETTINGS):
        environment["GOMP_SPINCOUNT"] = SPINS
        environment["OMP_NUM_THREADS"] = str(idle_cores())


def idle_cores() -> int:
    """How many cores this process may use that nobody else does just now: at least one."""
    allowed = allowed_cores()
    before = _busy_and_all()
    if allowed == 1 or before is None:
        return allowed
    time.sleep(MOMENT)
    busy, every = (after - then for after, then in zip(_busy_and_all(), before, strict=True))
    others = (os.cpu_count() or 1) * busy / max(every, 1)
    return max(1, min(allowed, round((os.cpu_count() or 1) - others)))


def allowed_cores() -> int:
    """How many cores this process may use: those it is bound to, and no more than its container has time for."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(bound, _quota())))


def _quota() -> float:
    """Cores' worth of time that the control group has; infinite where nothing limits it."""
    for file in (CGROUP / "cpu.max", CGROUP / "cpu" / "cpu.cfs_quota_us"):  # of version 2, and of version 1
        if file.is_file():
            parts = file.read_text().split()
            if len(parts) == 1:
                parts.append((file.parent / "cpu.cfs_period_us").read_text())
            quota, period = parts
            return math.inf if quota in ("max", "-1") else float(quota) / float(period)
    return math.inf


def _busy_and_all() -> tuple[int, int] | None:
    """Ticks that all cores have worked, and that have passed for them; None where the system does not tell."""
    if not PROC.is_file():
        return None
    user, nice, system, idle, waiting, *rest = map(int, PROC.read_text().splitlines()[0].split()[1:9])
    busy = user + nice + system + sum(rest)
    return busy, busy + idle + waiting


@contextmanager
def same_threads(file: Path) -> Iterator[None]:
    """Compute with as many threads as the run that began in a folder: sums then have the same bits.

    Args:
        file: that keeps their number; written where there is none yet.
    """
    import torch

    before = torch.get_num_threads()
    if file.is_file():
        torch.set_num_threads(int(file.read_text("utf-8")))
    else:
        file.write_text(str(before), "utf-8")
    try:
        yield
    finally:
        torch.set_num_threads(before)
