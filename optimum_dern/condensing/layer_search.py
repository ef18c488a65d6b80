"""Greedy search of the layers whose condensation the model notices least (CD-MoE, arXiv 2412.00069).

Each time, of the layers that are left, the one is condensed with which, beside those condensed already,

    mean over tokens of JS( softmax h(x) || softmax h'(x) )

is least; h and h' are what the last decoder layer gives in the original and in the condensed model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.merging.condense import jensen_shannon
from ..data.labels import model_inputs, real_tokens
from ..machine.progress import progress_bar
from ..models.forward import StopForward, run_until_stopped


__all__ = ["FoundLayers", "last_outputs", "replaced_blocks", "search_layers"]

TOKENS = 4096  # on which models are compared, in whole batches


class FoundLayers(NamedTuple):
    """Layers in the order in which they were chosen, with the divergence that the model has with each one more."""

    positions: list[int]
    divergences: list[float]


@torch.no_grad()
def search_layers(
    model: nn.Module,
    last: nn.Module,
    batches: Sequence[dict],
    networks: Mapping[int, tuple[str, nn.Module]],
    count: int,
    possible: Callable[[list[int]], list[int]],
) -> FoundLayers:
    """Search layers to condense, each time the one of which the model's last hidden states change least.

    Args:
        model: as it was before, and is afterwards.
        last: its last decoder layer.
        batches: calibration batches, of which the first are used.
        networks: by position, the name of a block and the dense network in its place.
        count: how many layers.
        possible: returns the layers that may be next, from those that are chosen.
    """
    batches = _first(batches)
    original, found = last_outputs(model, last, batches), FoundLayers([], [])
    for _ in progress_bar(range(count), "Searching layers"):
        tried = {}
        for position in possible(found.positions):
            with replaced_blocks(model, [networks[p] for p in (*found.positions, position)]):
                tried[position] = _divergence(original, last_outputs(model, last, batches))
        best = min(tried, key=tried.get)  # of equals the first
        found.positions.append(best)
        found.divergences.append(tried[best])
    return found


@contextmanager
def replaced_blocks(model: nn.Module, networks: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
    """Put networks in the place of named modules of a model while the context is open."""
    own = [(name, model.get_submodule(name)) for name, _ in networks]
    try:
        for name, network in networks:
            model.set_submodule(name, network)
        yield
    finally:
        for name, module in own:
            model.set_submodule(name, module)


def last_outputs(model: nn.Module, last: nn.Module, batches: Sequence[dict]) -> list[Tensor]:
    """Run a model on batches; return what its last decoder layer gives for the real tokens of each: (n, d)."""
    outputs: list[Tensor] = []

    def receive(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        outputs.append((output if isinstance(output, Tensor) else output[0]).flatten(0, -2))
        raise StopForward

    handle = last.register_forward_hook(receive)
    try:
        for batch in batches:
            inputs = {name: value.to(model.device) for name, value in model_inputs(batch).items()}
            run_until_stopped(model, **inputs, use_cache=False)
    finally:
        handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    return [found[real_tokens(mask, found.device)] for found, mask in zip(outputs, masks, strict=True)]


def _divergence(original: Sequence[Tensor], condensed: Sequence[Tensor]) -> float:
    sums = [jensen_shannon(*pair).sum(dtype=torch.float64) for pair in zip(original, condensed, strict=True)]
    return torch.stack(sums).sum().item() / sum(map(len, original))


def _first(batches: Sequence[dict]) -> list[dict]:
    """Return the first batches that have enough tokens together."""
    chosen, tokens = [], 0
    for batch in batches:
        if tokens < TOKENS:
            chosen.append(batch)
            tokens += int(batch["attention_mask"].sum())
    return chosen
