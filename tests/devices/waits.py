"""Counts of the moments at which a host waits for a device, by the line of the package that is the reason."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


__all__ = ["count", "count_waits"]

_counters: list[Counter] = []  # of the open `count_waits`


@contextmanager
def count_waits() -> Iterator[Counter]:
    """Count the moments at which a host would wait, by kind and line of the package, such as "rule.py:83 share".

    Kinds are "read" (a value, or how large a result is), "down" (a copy to the CPU) and "up" (a copy from it).
    """
    counter: Counter = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def count(kind: str) -> None:
    """Note a wait in all open counters."""
    frame = sys._getframe(1)
    while _counters and frame is not None and "/optimum_dern/" not in frame.f_code.co_filename:
        frame = frame.f_back
    line = "elsewhere"
    if frame is not None:
        line = f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
    for counter in _counters:
        counter[kind, line] += 1
