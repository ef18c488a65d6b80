"""Provider of a checkpoint's decoder layers that copies their unchanged tensors to the outputs when it reads them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from ..source.loader import PartLoader
from .tensors import CheckpointOutput


__all__ = ["CheckpointLayers"]


class CheckpointLayers:
    """Loads the original decoder layers of a checkpoint for the engine, one at a time.

    Tensors that compression does not change are written to all outputs when they are read, so the source is read once.

    Args:
        loader: of the source checkpoint.
        outputs: compressed checkpoints, one for each result.
    """

    def __init__(self, loader: PartLoader, outputs: Sequence[CheckpointOutput]) -> None:
        self.loader, self.reader, self.outputs = loader, loader.reader, outputs
        self.reader.after_read = self._copy

    def outside(self) -> AbstractContextManager:
        """Load everything outside the decoder layers, such as embeddings, while the context is open."""
        return self.loader.outside()

    def loaded(self, position: int) -> AbstractContextManager:
        """Load one decoder layer while the context is open."""
        return self.loader.loaded(position)

    def copy_rest(self) -> None:
        """Copy the unchanged tensors that have not been read so far, and close all files."""
        self.reader.after_read = None  # no layer is read any more
        for name in sorted(set().union(*(output.missing() for output in self.outputs))):
            self._copy(name, self.reader.read(name))
        self.reader.close()
        for output in self.outputs:
            output.save()

    def _copy(self, name: str, tensor: Tensor) -> None:
        for output in self.outputs:
            output.copy(name, tensor)
