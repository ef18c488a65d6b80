"""Decoder layers between a source and its compressed checkpoints: read once, then written or copied to each."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor

from ...core.neurons.selection import narrow
from ...core.router.rows import retain
from ...models.moe.original import original_kept
from ...models.moe.structure import MoELayer, layers_by_position
from ...models.moe.view import LayerWeights, read_layer, retained_routing, write_layer_
from ...results.report import LayerReport
from ..format.reader import CheckpointReader
from ..format.tensor_file import DTYPES
from ..source.loader import PartLoader
from .manifest import Manifest
from .plan import OutputPlan, layer_parameters
from .shards import ShardWriter


__all__ = ["CheckpointOutput", "copy_rest", "copy_when_read_", "shrink_"]


class CheckpointOutput:
    """Sink that writes the compressed layers of one result to its shards, and notes them in its manifest.

    Of several processes, only the one whose manifest has `writes` set writes anything.

    Args:
        loader: of the source checkpoint.
        layers: the model's MoE layers, with E experts.
        plan: of the output's tensors.
        writer: of the output's shards.
        manifest: of the layers finished so far, by earlier runs, too.
        num_experts: N, experts that each layer keeps.
        width: neurons of each.
    """

    in_place = True  # compressed layers need not be restored, since each one is loaded for one use

    def __init__(
        self,
        loader: PartLoader,
        layers: Sequence[MoELayer],
        plan: OutputPlan,
        writer: ShardWriter,
        manifest: Manifest,
        num_experts: int,
        width: int,
    ) -> None:
        self.loader, self.plan, self.writer, self.manifest = loader, plan, writer, manifest
        self.model, self.reader, self.names = loader.model, loader.reader, loader.names
        self.num_experts, self.width = num_experts, width
        self.positions = layers_by_position(self.model, layers)
        self.finished = {position: note and LayerReport(**note) for position, note in manifest.layers.items()}

    @contextmanager
    def loaded(self, position: int) -> Iterator[None]:
        """Load one compressed decoder layer that an earlier run has written, while the context is open."""
        layer = self.positions[position]
        replaced = self.names.original(self.model, layer_parameters(layer, layer.num_experts))
        tensors = {n: tensor for n, tensor in self.loader.tensors(position).items() if n not in replaced}
        tensors |= {name: self.writer.lazy(name) for name in self.plan.rewritten[layer.name]}
        with original_kept(layer):
            shrink_(layer, self.num_experts, self.width)
            with self.loader.loaded(position, tensors):
                yield

    def finish(self, position: int, report: LayerReport | None) -> None:
        """Write a compressed layer's experts and router, and note in the manifest that it is finished."""
        self.finished[position] = report
        if not self.manifest.writes:
            return
        self.reader.check_unchanged()  # before the manifest says that the layer is right
        if report is not None:
            self._write_experts(self.positions[position], report.retained)
        self.writer.flush()
        self.manifest.finish_layer(position, report and asdict(report))

    def copy(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the source, if it is to be copied and is not written yet."""
        if self.manifest.writes and name in self.plan.copied and name not in self.manifest.tensors:
            self.manifest.tensors[name] = self.writer.write(name, tensor.to(self._dtype(name)))

    def write(self, tensors: Mapping[str, Tensor], retained: list[int] | None = None) -> None:
        """Write tensors that take the place of others.

        Args:
            tensors: by their names in the checkpoint.
            retained: experts whose router rows they are; those of the source are copied, not rounded.
        """
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != self.writer.places[name].shape:  # fused, and stored transposed
                tensor = tensor.transpose(-1, -2)
            tensor = self._in_stored_dtype(name, tensor.cpu(), retained)
            self.manifest.tensors[name] = self.writer.write(name, tensor)

    def missing(self) -> set[str]:
        """Return the names of the tensors that are still to be copied from the source."""
        return self.plan.copied - self.manifest.tensors.keys() if self.manifest.writes else set()

    def save(self) -> None:
        """Flush everything written so far to disk, and close the files."""
        self.reader.check_unchanged()
        self.writer.flush()
        self.manifest.save()
        self.writer.close()

    def _dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.writer.places[name].dtype]

    def _write_experts(self, layer: MoELayer, retained: list[int]) -> None:
        state = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        current = {name: state[name].detach() for name in layer_parameters(layer, self.num_experts)}
        for parameter, value in current.items():
            is_router = not parameter.startswith(f"{layer.experts_name}.")
            groups = self.names.by_expert(self.model, parameter, value.shape)
            if groups is None:
                self.write(self.names.original(self.model, {parameter: value}), retained if is_router else None)
            for expert, group in enumerate(groups or []):  # one by one, as conversion copies them
                pieces = self.names.original(self.model, {parameter: value[expert : expert + 1]}).values()
                self.write(dict(zip(group, pieces, strict=True)))

    def _in_stored_dtype(self, name: str, tensor: Tensor, retained: list[int] | None) -> Tensor:
        """Convert a tensor to the output's dtype; unchanged router rows (`retained`) are copied, not rounded."""
        dtype = self._dtype(name)
        if dtype == tensor.dtype or retained is None:
            return tensor.to(dtype)
        shape = self.reader.infos[name].shape
        dims = [dim for dim, (a, b) in enumerate(zip(shape, tensor.shape, strict=True)) if a != b]
        if len(dims) <= 1:  # none where all experts stay
            stored = self.reader.read(name)
            stored = retain(stored, torch.tensor(retained), dims[0]) if dims else stored
            if torch.equal(stored.to(tensor.dtype), tensor):
                return stored.to(dtype)
        return tensor.to(dtype)


def copy_when_read_(reader: CheckpointReader, outputs: Sequence[CheckpointOutput]) -> None:
    """Copy tensors that compression does not change to all outputs when they are read, so the source is read once.

    Args:
        reader: of the source checkpoint.
        outputs: compressed checkpoints, one for each result.
    """

    def copy(name: str, tensor: Tensor) -> None:
        for output in outputs:
            output.copy(name, tensor)

    reader.after_read = copy


def copy_rest(reader: CheckpointReader, outputs: Sequence[CheckpointOutput]) -> None:
    """Copy the unchanged tensors that have not been read so far, and close all files."""
    copy_when_read_(reader, outputs)
    for name in sorted(set().union(*(output.missing() for output in outputs))):
        reader.read(name)
    reader.after_read = None
    reader.close()
    for output in outputs:
        output.save()


def shrink_(layer: MoELayer, num_experts: int, width: int) -> None:
    """Give a layer without weights the shapes that it has with N experts of a width."""
    weights, first = read_layer(layer), torch.arange(num_experts)
    routing = retained_routing(layer, weights, first)
    segments = narrow(weights.segments.select(first), torch.arange(width).expand(num_experts, width))
    write_layer_(layer, LayerWeights(segments, routing))
