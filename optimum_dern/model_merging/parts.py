"""The checkpoints of a merge, of which the same part is in memory together: a decoder layer, or what is outside.

A part of all K + 1 checkpoints is the base's weights and the K differences from them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint.format.conversion import release_
from ..checkpoint.source.loader import PartLoader
from ..evaluation.loss.streamed import StreamedCheckpoint


__all__ = ["CheckpointParts", "Part", "holding"]


class Part(NamedTuple):
    """The weights of the base in one of its parts, and what the K fine-tuned checkpoints add to them."""

    own: dict[str, Tensor]  # by parameter
    differences: dict[str, Tensor]  # (K, ...) by parameter


class CheckpointParts:
    """The base and its fine-tuned checkpoints, without weights until a part is loaded.

    Args:
        base: folder or Hub id.
        checkpoints: folders or Hub ids, whose tensors are those of the base.
        device: to load to.
        **source: `revision`, `token`, `trust_remote_code` and `dtype`, of all.

    Raises:
        ValueError: a family whose layers cannot be run one by one.
    """

    def __init__(
        self, base: str | Path, checkpoints: Sequence[str | Path], device: torch.device, **source: Any
    ) -> None:
        models = [StreamedCheckpoint(model, device, **source) for model in (base, *checkpoints)]
        self.base, self.sources = models[0], models[1:]
        if any(layer.twins for layer in self.base.loader.positions.values()):
            raise ValueError(f"two stacks of {base} share their layers; merge it in memory, without --layerwise")

    def __len__(self) -> int:
        """Return the number of decoder layers."""
        return len(self.base.loader.decoder_layers)

    def outside(self, visit: Callable[[int], None] = lambda number: None) -> Part:
        """Load what is outside the decoder layers; `visit` is called with each source's number while it is there."""
        return self._load(lambda loader: loader.outside(head=True, everything=True), visit)

    def layer(self, position: int, visit: Callable[[int], None] = lambda number: None) -> Part:
        """Load a decoder layer; `visit` is called with each source's number while its own layer is there."""
        return self._load(lambda loader: loader.loaded(position), visit)

    def check_unchanged(self) -> None:
        """Refuse to go on where a file of the checkpoints has changed since they were opened."""
        for checkpoint in (self.base, *self.sources):
            checkpoint.loader.reader.check_unchanged()

    @torch.no_grad()
    def _load(self, opened: Callable[[PartLoader], AbstractContextManager], visit: Callable[[int], None]) -> Part:
        with opened(self.base.loader):
            own = {
                name: parameter.detach()
                for name, parameter in self.base.skeleton.named_parameters()
                if parameter.device.type != "meta"
            }
        differences = {name: tensor.new_empty(len(self.sources), *tensor.shape) for name, tensor in own.items()}
        for number, source in enumerate(self.sources):
            with opened(source.loader):
                visit(number)
                for name, tensor in own.items():
                    differences[name][number] = source.skeleton.get_parameter(name).to(tensor) - tensor
        return Part(own, differences)


@contextmanager
def holding(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a model without weights some of its parameters while the context is open."""
    for name, tensor in weights.items():
        module, _, attribute = name.rpartition(".")
        model.get_submodule(module)._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
    model.tie_weights(recompute_mapping=False)  # those that were tied to a replaced parameter
    try:
        yield
    finally:
        release_(model)
        model.tie_weights(recompute_mapping=False)
