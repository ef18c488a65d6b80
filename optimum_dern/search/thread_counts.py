"""The number of experts that a router chooses, as an attribute that depends on the thread."""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import nn

from ..models.moe.structure import TOP_K_KEYS, MoELayer


__all__ = ["as_trained", "asked", "following_thread", "router_modules", "set_counts"]

T = TypeVar("T")
_counts: ContextVar[Mapping[int, int]] = ContextVar("active experts by the id of a router module")
_lock = threading.Lock()
_users: dict[int, int] = {}  # open contexts by the id of a module whose class is replaced


@contextmanager
def set_counts(numbers: Mapping[int, int]) -> Iterator[None]:
    """Set this thread's numbers of active experts by the id of a router module, beside those set before."""
    token = _counts.set({**asked(), **numbers})
    try:
        yield
    finally:
        _counts.reset(token)


def asked() -> Mapping[int, int]:
    """Return this thread's numbers of active experts by the id of a router module."""
    return _counts.get({})


def router_modules(layer: MoELayer) -> list[nn.Module]:
    """List the modules of a block that hold the number of active experts, or a config that does."""
    modules = [module for name, module in layer.block.named_modules() if not name.startswith("experts")]
    found = [module for module in modules if module.__dict__.get("top_k") == layer.top_k]
    return found or [module for module in modules if _key_of(module.__dict__.get("config"), layer.top_k)]


def _key_of(config: Any, count: int) -> str | None:
    """Return the config key that holds the number of active experts, if there is one."""
    return next((key for key in TOP_K_KEYS if config is not None and getattr(config, key, None) == count), None)


@contextmanager
def following_thread(module: nn.Module) -> Iterator[None]:
    """Give a module a class in which its number of active experts depends on the thread."""
    with _lock:
        if not _users.get(id(module)):
            module.__class__ = _class_of(type(module), module)
        _users[id(module)] = _users.get(id(module), 0) + 1
    try:
        yield
    finally:
        with _lock:
            _users[id(module)] -= 1
            if not _users[id(module)]:
                del _users[id(module)]
                module.__class__ = type(module).__mro__[1]


def _class_of(kind: type, module: nn.Module) -> type:
    name = "top_k" if "top_k" in module.__dict__ else "config"

    def read(self: nn.Module) -> Any:
        own, count = self.__dict__[name], asked().get(id(self))
        if count is None:
            return own
        return count if name == "top_k" else _with_count(own, count)

    def write(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value

    return type(kind.__name__, (kind,), {name: property(read, write)})


def _with_count(config: Any, count: int) -> Any:
    changed = copy.copy(config)
    trained = next(getattr(config, key) for key in TOP_K_KEYS if getattr(config, key, None) is not None)
    setattr(changed, _key_of(config, trained), count)
    return changed


def as_trained(layer: MoELayer, run: Callable[[], T]) -> T:
    """Call a function while this thread's number of active experts of a layer is the trained one."""
    own = {id(module) for module in router_modules(layer)}
    token = _counts.set({key: value for key, value in asked().items() if key not in own})
    try:
        return run()
    finally:
        _counts.reset(token)
