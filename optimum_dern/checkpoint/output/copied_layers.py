"""The decoder layers of a checkpoint, one at a time: loaded from the source, for one output or several."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from ..source.loader import PartLoader
from .tensors import CheckpointOutput


__all__ = ["CheckpointLayers"]


class CheckpointLayers:
    """Provides the engine with the original decoder layers of a checkpoint.

    Tensors that pass through are written to all outputs when they are read, so the source is read once.

    Args:
        loader: of the source's parts.
        outputs: that take tensors from it.
    """

    def __init__(self, loader: PartLoader, outputs: Sequence[CheckpointOutput]) -> None:
        self.loader, self.reader, self.outputs = loader, loader.reader, outputs
        self.reader.after_read = self._copy

    def outside(self) -> AbstractContextManager:
        """Embeddings and positions, for as long as the context is open."""
        return self.loader.outside()

    def loaded(self, position: int) -> AbstractContextManager:
        """One decoder layer, for as long as the context is open."""
        return self.loader.loaded(position)

    def copy_rest(self) -> None:
        """Write the tensors that pass through and were not needed so far."""
        self.reader.after_read = None  # no layer is read any more
        for name in sorted(set().union(*(output.missing() for output in self.outputs))):
            self._copy(name, self.reader.read(name))
        self.reader.close()
        for output in self.outputs:
            output.save()

    def _copy(self, name: str, tensor: Tensor) -> None:
        for output in self.outputs:
            output.copy(name, tensor)
