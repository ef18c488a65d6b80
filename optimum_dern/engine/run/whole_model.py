"""Loading of a whole checkpoint at once, where it fits in memory, so that the model can write calibration text."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ...checkpoint.source.find import Source
from ...machine.progress import total_memory
from ...results.public_names import public_source
from ..cost.memory import INTERPRETER
from .own_text import CannotWrite


__all__ = ["bytes_needed", "check_fits", "origin_of", "whole_model"]

MARGIN = 1.2  # of the weights' size: the key-value cache and the activations of the sequences written at once


def bytes_needed(weights: int, device: torch.device) -> int:
    """Estimate the memory that a program needs on a device which holds and runs some bytes of weights there."""
    return int(MARGIN * weights) + (INTERPRETER if device.type == "cpu" else 0)


def check_fits(model: Any, device: torch.device, bound: int | None) -> None:
    """Refuse a model that does not fit in the memory of a device.

    Args:
        model: without weights.
        device: to load it to.
        bound: on memory use in bytes, if there is one.

    Raises:
        CannotWrite: the message names what else writes the text.
    """
    needed = bytes_needed(sum(p.numel() * p.element_size() for p in model.parameters()), device)
    total = total_memory(device) if bound is None else min(total_memory(device), bound)
    if needed > total:
        raise CannotWrite(
            f"the model takes {needed / 2**30:.1f} GiB in memory to write its own calibration text, and there are "
            f"{total / 2**30:.1f}; write it elsewhere or quantised (optimum-dern sample MODEL text.jsonl, see the "
            "documentation of large models) and give that file as the dataset"
        )


@contextmanager
def whole_model(source: Source, device: torch.device) -> Iterator[None]:
    """Load all weights of a checkpoint into its skeleton while the context is open."""
    loader = source.open_loader(device)
    with ExitStack() as stack:
        stack.enter_context(loader.outside(head=True))
        for position in range(len(loader.decoder_layers)):
            stack.enter_context(loader.loaded(position))
        yield


def origin_of(source: Source) -> str:
    """Name the model of a checkpoint and its version: a commit of the Hub, or a digest of its weight files' states."""
    name, version = public_source(source.name), source.commit
    if version is None:
        files = sorted(source.folder.glob("*.safetensors"))
        states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        version = hashlib.sha256(repr(states).encode()).hexdigest()[:16]
    return f"by {name} {version}"
