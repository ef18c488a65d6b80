"""Independence of the caller's torch settings and module modes, and checks of the device."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


__all__ = [
    "GPUS",
    "check_device",
    "check_precision",
    "default_device",
    "devices_of",
    "evaluation_mode",
    "finish",
    "plain_torch",
]

GPUS = ("cuda", "xpu")  # device types that torch treats alike, memory statistics included


@contextmanager
def plain_torch() -> Iterator[None]:
    """Turn off inference mode, autocast and any default device other than the CPU, until the context exits."""
    accelerator = _find_accelerator()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in {"cpu", "cpu" if accelerator is None else accelerator.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and restore the mode of every module on exit."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def default_device(device: str | None = None) -> torch.device:
    """The device to compute on: the one that is named, else a GPU where there is one, else the CPU.

    Raises:
        ValueError: there is no device of that name.
    """
    check_device(device)
    there = (kind for kind in GPUS if getattr(torch, kind).is_available())
    return torch.device(device or next(there, "cpu"))


def devices_of(model: nn.Module) -> list[torch.device]:
    """List the devices that a model's parameters are on: several, where its layers are spread over them."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))


def finish(devices: Iterable[torch.device]) -> None:
    """Wait until all devices have done what they were given; the CPU computes at once."""
    for device in devices:
        if device.type in GPUS:
            torch.accelerator.synchronize(device)


def check_device(device: object) -> None:
    """Refuse a device that does not exist or lacks float64, without initialising it.

    Raises:
        ValueError: naming it and the mend.
    """
    check_precision(device)
    if device is None:
        return
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{device!r} is not a device of torch; give cpu or cuda, or leave it out") from error
    accelerator, count = _find_accelerator(), torch.accelerator.device_count()
    kind = accelerator.type if accelerator is not None and count else None
    if found.type not in ("cpu", "meta", kind) or (found.type == kind and (found.index or 0) >= count):
        there = "the cpu alone" if kind is None else f"the cpu and {kind}:0 to {kind}:{count - 1}"
        raise ValueError(
            f"there is no device {str(device)!r} here: torch {torch.__version__} finds {there}; name what is "
            "there, or leave it out"
        )


def _find_accelerator() -> torch.device | None:
    try:
        return torch.accelerator.current_accelerator()
    except RuntimeError:  # of torch 2.6, where there is none
        return None


def check_precision(device: object) -> None:
    """Refuse a device that lacks float64.

    Raises:
        ValueError: naming it and the mend.
    """
    if str(device).partition(":")[0] == "mps":
        raise ValueError(
            f"the device {str(device)!r} has no float64, in which statistics and losses are summed up; use the CPU "
            "(--device cpu, device='cpu', or model.to('cpu'))"
        )
