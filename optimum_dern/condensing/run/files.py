"""The networks of condensed layers in working files, until it is known which of them the result has."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checkpoint.format.conversion import release_
from ...checkpoint.format.tensor_file import dtype_name
from ...checkpoint.output.shards import OutputTensor, ShardWriter
from ...core.layer.segments import Segments
from ..dense_form import PROJECTIONS
from ..dense_network import fill_
from ..plan import CondensingPlan


__all__ = ["DenseFiles"]


class DenseFiles:
    """Working files with a dense network for every layer of a plan; those of an interrupted run are continued.

    Args:
        folder: working folder.
        plan: with the networks, which are on the meta device but while they are in use.
        device: to load them to.
    """

    def __init__(self, folder: Path, plan: CondensingPlan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        files = {f"condensed-{position:05d}.safetensors": self._tensors(position) for position in plan.networks}
        self.writer = ShardWriter(folder, files)

    def write(self, position: int, neurons: Segments) -> None:
        """Write the network of a layer to disk, while the original one is in memory."""
        network = fill_(self.plan.networks[position], neurons, self.plan.at[position])
        for path in PROJECTIONS:
            self.writer.write(f"{position}.{path}", network.get_parameter(path).detach().cpu())
        self.writer.flush()
        release_(network)

    def read(self, position: int) -> dict[str, Tensor]:
        """Read the tensors of a layer's network, by their names in it."""
        return {path: self.writer.lazy(f"{position}.{path}")[...] for path in PROJECTIONS}

    @contextmanager
    def loaded(self, position: int) -> Iterator[nn.Module]:
        """Load the network of a layer while the context is open."""
        network = self.plan.networks[position]
        tensors = {path: tensor.to(self.device) for path, tensor in self.read(position).items()}
        network.load_state_dict(tensors, assign=True)
        try:
            yield network
        finally:
            release_(network)

    def _tensors(self, position: int) -> list[OutputTensor]:
        network, dtype = self.plan.networks[position], self.plan.at[position].experts.down_proj.dtype
        shapes = {path: tuple(network.get_parameter(path).shape) for path in PROJECTIONS}
        return [OutputTensor(f"{position}.{path}", dtype_name(dtype), shape) for path, shape in shapes.items()]
