"""Number of torch threads: one for every core that is idle when the program starts.

OpenMP threads wait for one another by spinning.  On cores that other processes use, two threads can take ten times as
long as one; on idle cores spinning is fastest.  torch by default uses all cores of a machine, even if they are busy or
not available to this process.
"""

import math
import os
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from ..text_files import replace_text


__all__ = ["allowed_cores", "choose_threads", "computing_with", "threads_of_run"]

SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SPINS = "10000"  # for GNU's OpenMP: as fast as its default on idle cores, and much faster on shared ones
MOMENT = 0.15  # seconds over which the cores' load is measured
PROC, CGROUP = Path("/proc/stat"), Path("/sys/fs/cgroup")


def choose_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set torch's number of threads to that of the idle cores; call it before torch is imported.

    Args:
        environment: variables to set; left unchanged if the user has set any OpenMP or MKL variable of `SETTINGS`.
    """
    if not any(name in environment for name in SETTINGS):
        environment["GOMP_SPINCOUNT"] = SPINS
        environment["OMP_NUM_THREADS"] = str(idle_cores())


def idle_cores() -> int:
    """Return how many of the allowed cores are currently idle, at least one."""
    allowed = allowed_cores()
    before = _busy_and_all()
    if allowed == 1 or before is None:
        return allowed
    time.sleep(MOMENT)
    busy, every = (after - then for after, then in zip(_busy_and_all(), before, strict=True))
    others = (os.cpu_count() or 1) * busy / max(every, 1)
    return max(1, min(allowed, round((os.cpu_count() or 1) - others)))


def allowed_cores() -> int:
    """Return how many cores this process may use, by its CPU affinity and its container's CPU quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(bound, _quota())))


def _quota() -> float:
    """Return the CPU quota of the control group in cores, or infinity."""
    for file in (CGROUP / "cpu.max", CGROUP / "cpu" / "cpu.cfs_quota_us"):  # cgroup version 2, then version 1
        if file.is_file():
            parts = file.read_text().split()
            if len(parts) == 1:
                parts.append((file.parent / "cpu.cfs_period_us").read_text())
            quota, period = parts
            return math.inf if quota in ("max", "-1") else float(quota) / float(period)
    return math.inf


def _busy_and_all() -> tuple[int, int] | None:
    """Read the busy and the total ticks of all cores; None if the system does not report them."""
    if not PROC.is_file():
        return None
    user, nice, system, idle, waiting, *rest = map(int, PROC.read_text().splitlines()[0].split()[1:9])
    busy = user + nice + system + sum(rest)
    return busy, busy + idle + waiting


def threads_of_run(file: Path) -> int:
    """Return torch's number of threads in the run that wrote a file; the current one, written there, if there is none.

    Args:
        file: in the working folder of a run, which an interrupted run leaves.
    """
    import torch

    if not file.is_file():
        replace_text(file, str(torch.get_num_threads()))
    return int(file.read_text("utf-8"))


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """Set torch's number of threads while the context is open: with the same number, sums have the same bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
