"""Loads parts of a model from its checkpoint and frees them again: a decoder layer, or everything outside of them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...core.layer.workspace import IN_MEMORY
from ...models.moe.structure import MoELayer, find_decoder, layers_by_position
from ..format.conversion import NameMap, load_tensors_, release_
from ..format.reader import CheckpointReader, LazyTensor


__all__ = ["PartLoader"]


class PartLoader:
    """Loads the weights of parts of a model that is on the meta device.

    Args:
        model: the whole model, without weights.
        layers: its MoE layers; none of a dense model.
        reader: of its checkpoint.
        names: mapping from the checkpoint's tensors to the model's parameters.
        device: to load weights to.
    """

    def __init__(
        self, model: Any, layers: Sequence[MoELayer], reader: CheckpointReader, names: NameMap, device: torch.device
    ) -> None:
        self.model, self.reader, self.names, self.device = model, reader, names, device
        self.decoder, self.decoder_layers = find_decoder(model)
        self.positions = layers_by_position(model, layers)
        workspace = layers[0].workspace if layers else IN_MEMORY
        self.empty = workspace.empty  # allocates large tensors, in files where the workspace has them there

    @contextmanager
    def outside(self, head: bool = False, everything: bool = False) -> Iterator[None]:
        """Load what is around the decoder layers, such as embeddings, while the context is open.

        Args:
            head: load the output head, too.
            everything: load all that is outside the decoder layers, such as a vision tower.
        """
        around, inside = self.decoder.rpartition(".")[0], f"{self.decoder}."
        prefixes = (f"{around}." if around and not everything else "",)
        if head:
            output = self.model.get_output_embeddings()
            prefixes += tuple(f"{name}." for name, module in self.model.named_modules() if module is output)
        # A tied weight may be stored under the name of a parameter outside these prefixes.
        stored = {first for name, first in self.model.all_tied_weights_keys.items() if name.startswith(prefixes)}
        wanted = {
            name: self.reader.lazy(name)
            for name, target in self.names.target.items()
            if (target.startswith(prefixes) or target in stored) and not target.startswith(inside)
        }
        self._load(self.model, wanted)
        self.model.tie_weights(recompute_mapping=False)  # loading has replaced the parameters that were tied
        try:
            yield
        finally:
            release_(self.model)
            self.model.tie_weights(recompute_mapping=False)  # and so has freeing them
            self.reader.close()

    @contextmanager
    def loaded(self, position: int, tensors: Mapping[str, LazyTensor] | None = None) -> Iterator[None]:
        """Load one decoder layer's weights while the context is open; the system then reads on in the next layer.

        Args:
            position: index of the layer.
            tensors: to load it from, by their names in the checkpoint; by default the checkpoint's own.
        """
        layer = self.decoder_layers[position]
        tensors = dict(self.tensors(position) if tensors is None else tensors)
        if position in self.positions:
            self._load_experts(self.positions[position], tensors)
        self._load(layer, tensors)
        empty = [name for name, parameter in layer.named_parameters() if parameter.device.type == "meta"]
        if empty:
            raise ValueError(f"{self.reader.folder} has no weights for layer {position}, {empty[0]}; it is incomplete")
        if position + 1 < len(self.decoder_layers):
            self.reader.announce(self.names.sources(f"{self.decoder}.{position + 1}."))
        try:
            yield
        finally:
            release_(layer)
            self.reader.close()

    def tensors(self, position: int) -> dict[str, LazyTensor]:
        """Return the checkpoint's tensors of a decoder layer, to be read when they are used."""
        return {name: self.reader.lazy(name) for name in self.names.sources(f"{self.decoder}.{position}.")}

    def _load_experts(self, layer: MoELayer, tensors: dict[str, LazyTensor]) -> None:
        """Load experts stored one by one, each tensor read into its place if it can be; remove them from `tensors`."""
        parameters = layer.experts._parameters
        for name in [name for name, parameter in parameters.items() if parameter is not None]:
            shape, dtype = parameters[name].shape, parameters[name].dtype
            groups = self.names.by_expert(self.model, f"{layer.experts_name}.{name}", shape)
            if groups is None:
                continue
            missing = [source for group in groups for source in group if source not in tensors]
            if missing:
                raise ValueError(f"{self.reader.folder} has no {missing[0]}; it is incomplete")
            together = self.empty(shape, dtype=dtype, device=self.device)
            slots = self.names.slots(self.model, f"{layer.experts_name}.{name}", shape)
            for expert, group in enumerate(groups):
                part = {source: tensors.pop(source) for source in group}
                if slots is not None and [lazy.info.shape for lazy in part.values()] == [own for _, own in slots]:
                    for (place, own), lazy in zip(slots, part.values(), strict=True):
                        lazy.read_into_(together[expert].flatten()[place].view(own))
                    continue
                parameters[name] = nn.Parameter(torch.empty(1, *shape[1:], dtype=dtype, device="meta"), False)
                load_tensors_(self.model, part, self.device)
                together[expert] = parameters[name].detach()[0]
            parameters[name] = nn.Parameter(together, False)

    def _load(self, module: nn.Module, tensors: Mapping[str, LazyTensor]) -> None:
        load_tensors_(self.model, {name: lazy.into(self.empty) for name, lazy in tensors.items()}, self.device)
        for part in module.modules():  # buffers that no checkpoint stores, such as rotary frequencies, are on the CPU
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    part._buffers[name] = buffer.to(self.device)
