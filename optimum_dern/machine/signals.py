"""Signals that ask a process to end, answered as an interrupt from the keyboard is: files closed, locks released."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


__all__ = ["Terminated", "ending_cleanly"]

SIGNALS = ("SIGTERM", "SIGHUP")  # of batch systems and containers, and of a connection that was lost


class Terminated(KeyboardInterrupt):
    """The system has asked the process to end.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def ending_cleanly() -> Iterator[None]:
    """Raise `Terminated` when the process is asked to end, until the context exits.

    Signals that the caller has answered or ignored himself (`nohup`) stay as they are.  So do those of one of several
    processes: it may be waiting for the others, and Python would not learn of the signal before they answer.

    Raises:
        Terminated: at whatever statement the program has reached.
    """
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1 and threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)] if alone else []
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated(number)
