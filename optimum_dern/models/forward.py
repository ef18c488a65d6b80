"""Control of a module's forward pass: replace it, or end it early."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


__all__ = ["StopForward", "replaced_forward", "run_until_stopped"]


class StopForward(Exception):
    """Raised by a hook to end a forward pass early, once everything is recorded."""


def run_until_stopped(module: nn.Module, *args, **kwargs) -> None:
    """Call a module whose hooks may end the forward pass with `StopForward`."""
    try:
        module(*args, **kwargs)
    except StopForward:
        return


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Replace the forward function of one module while the context is open."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
