"""Plan of the compressed checkpoint's tensors: those of the source, with smaller ones for experts and routers.

It is made from names and shapes alone, before any weight is read.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...models.moe.sizes import expert_shapes, routing_shapes
from ...models.moe.structure import MoELayer, find_decoder_layers
from ..format.conversion import NameMap
from ..format.reader import CheckpointReader
from .shards import OutputTensor


__all__ = ["OutputPlan", "layer_parameters", "plan_dense_output", "plan_output"]


Form = tuple[str, tuple[int, ...]]  # a tensor's dtype and shape


@dataclass
class OutputPlan:
    """The tensors of a compressed checkpoint, divided into copied and rewritten ones; MTP layers have neither."""

    copied: set[str] = field(default_factory=set)  # tensors that compression does not change
    rewritten: dict[str, list[str]] = field(default_factory=dict)  # tensors of each MoE layer, by the block's name
    tensors: list[OutputTensor] = field(default_factory=list)  # all tensors to write, layer by layer


def plan_output(
    model: Any,
    layers: Sequence[MoELayer],
    reader: CheckpointReader,
    names: NameMap,
    num_experts: int,
    width: int | None = None,
    dtype: str | None = None,
) -> OutputPlan:
    """Plan the tensors of the compressed checkpoint.

    Args:
        model: without weights, with E experts.
        layers: its MoE layers.
        reader: of the source checkpoint.
        names: mapping from the source's tensors to the model's parameters.
        num_experts: N, experts that each layer keeps.
        width: neurons of each; by default as many as in the source.
        dtype: safetensors dtype for the tensors stored in the same one as the experts; by default that of the source.

    Returns:
        The plan; every tensor of the source is copied, rewritten or dropped in it.

    Raises:
        ValueError: the experts are stored in a layout that is not supported.
    """
    plan = OutputPlan()
    replaced: set[str] = set()
    forms: dict[str, Form] = {}  # of the tensors to write in their places
    for layer in layers:
        if layer.twins:
            raise ValueError(f"two stacks share the experts of {layer.name}; compress this model in memory instead")
        before = names.original(model, layer_parameters(layer, layer.num_experts))
        for name, tensor in before.items():
            _check_stored(reader, name, tensor, layer)
        if extra := [name for name in names.sources(f"{layer.experts_name}.") if name not in before]:
            raise ValueError(
                f"{extra[0]} is one expert's more than the {layer.num_experts} of {layer.name} that config.json "
                "describes; download both again"
            )
        after = names.original(model, layer_parameters(layer, num_experts, width))
        for name, tensor in after.items():
            stored = reader.infos[name]
            forms[name] = stored.dtype, _shape(stored.shape, before[name].shape, tensor.shape)
        plan.rewritten[layer.name] = list(after)
        replaced |= before.keys()
    _complete_(plan, find_decoder_layers(model, layers[0]), reader, names, replaced, forms, dtype)
    return plan


def plan_dense_output(
    model: Any,
    layers: Sequence[MoELayer],
    reader: CheckpointReader,
    names: NameMap,
    dense: nn.Module,
    dtype: str | None = None,
) -> OutputPlan:
    """Plan the tensors of a checkpoint some of whose MoE layers have become dense.

    Args:
        model: without weights, with its MoE layers.
        layers: those that become dense.
        reader: of the source checkpoint.
        names: mapping from the source's tensors to the model's parameters.
        dense: the model with dense layers.
        dtype: safetensors dtype for the tensors stored in the same one as the experts; by default that of the source.
    """
    plan = OutputPlan()
    replaced: set[str] = set()
    forms: dict[str, Form] = {}
    for layer in layers:
        stored = reader.infos[names.sources(f"{layer.experts_name}.")[0]].dtype
        network = dense.get_submodule(layer.name)
        parameters = {f"{layer.name}.{name}": parameter for name, parameter in network.named_parameters()}
        after = names.original(dense, parameters)
        forms |= {name: (stored, tuple(tensor.shape)) for name, tensor in after.items()}
        plan.rewritten[layer.name] = list(after)
        replaced |= {*names.sources(f"{layer.name}.")}
    _complete_(plan, find_decoder_layers(model, layers[0]), reader, names, replaced, forms, dtype)
    return plan


def layer_parameters(layer: MoELayer, num_experts: int, width: int | None = None) -> dict[str, Tensor]:
    """Make meta tensors with the shapes of a layer's experts and router, by full name.

    Args:
        layer: as found in the model.
        num_experts: N.
        width: neurons of an expert; by default as many as found.
    """
    experts = expert_shapes(layer, num_experts, width)
    shapes = {f"{layer.experts_name}.{name}": shape for name, shape in experts.items()}
    shapes |= {f"{layer.name}.{path}": shape for path, shape in routing_shapes(layer, num_experts).items()}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _complete_(
    plan: OutputPlan,
    decoder: tuple[str, nn.ModuleList],
    reader: CheckpointReader,
    names: NameMap,
    replaced: Collection[str],
    forms: Mapping[str, Form],
    dtype: str | None,
) -> None:
    """Add all tensors to a plan: those of `forms`, the experts' first, and the source's that they do not replace."""
    usual, forms = next(iter(forms.values()))[0], dict(forms)
    for name, info in reader.infos.items():
        extra = name not in names.target and names.is_extra_layer(name, decoder[0], len(decoder[1]))
        if name not in replaced and not extra:
            plan.copied.add(name)
            forms[name] = info.dtype, info.shape
    for name, (stored, shape) in forms.items():
        plan.tensors.append(OutputTensor(name, dtype if dtype and stored == usual else stored, shape))
    plan.tensors.sort(key=lambda tensor: _natural(tensor.name))


def _shape(stored: Sequence[int], before: Sequence[int], after: Sequence[int]) -> tuple[int, ...]:
    """Return a stored tensor's shape, from those that transformers would save before and after the compression.

    Fused experts may be stored transposed, and transformers' own turns of them depend on the shapes.
    """
    if len(stored) < 3:
        return tuple(after)
    turned = (after[0], after[2], after[1])
    alike = [shape for shape in (tuple(after), turned) if shape[1] == stored[1] or shape[2] == stored[2]]
    return next((shape for shape in alike if shape[1:] == tuple(stored[1:])), alike[0])


def _check_stored(reader: CheckpointReader, name: str, tensor: Tensor, layer: MoELayer) -> None:
    found = reader.infos.get(name)
    swapped = (*tensor.shape[:-2], *tensor.shape[:-3:-1])
    if found is None or found.shape not in (tuple(tensor.shape), swapped):
        what = "is missing" if found is None else f"has the shape {found.shape}, not {tuple(tensor.shape)}"
        raise ValueError(
            f"{name}, a part of {layer.name}, {what}; the checkpoint's layout is not one that transformers saves. "
            "Load it with from_pretrained(..., output_loading_info=True); where that reports no missing keys, save it "
            "once and compress that, else its weights would be random"
        )


def _natural(name: str) -> list:
    """Return a sort key that puts layer 10 after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
