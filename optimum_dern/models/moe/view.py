"""Read a MoE layer as segments and write compressed ones back; the only code that modifies a model."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.layer.mixture import Activation
from ...core.layer.segments import Segments, parameters_from_segments, segments_from_parameters
from ...core.router.rows import retain
from ...machine.precision import products_in_tf32
from .structure import COUNT_ATTRIBUTES, COUNT_KEYS, WIDTH_ATTRIBUTES, MoELayer


__all__ = [
    "LayerWeights",
    "layer_activation",
    "read_layer",
    "release_experts_",
    "retained_routing",
    "write_width_attributes_",
    "write_counts_",
    "write_layer_",
    "write_routing_",
]


@dataclass(frozen=True)
class LayerWeights:
    """Expert segments and router tensors of a MoE layer with N experts."""

    segments: Segments
    routing: Mapping[str, Tensor]  # router tensors by their path inside the block

    @property
    def num_experts(self) -> int:
        return len(self.segments.up)


def read_layer(layer: MoELayer) -> LayerWeights:
    """Read a layer's weights, as views of the model's parameters where the layout allows.

    Experts with weights of 16 bits run in TF32 on CUDA, which rounds none of these and less than the model itself.
    """
    parameters = {name: tensor.detach() for name, tensor in layer.experts._parameters.items() if tensor is not None}
    routing = {r.path: r.tensor.detach() for r in layer.routing}
    workspace = layer.workspace
    if layer.experts.down_proj.element_size() < torch.float32.itemsize:
        workspace = workspace._replace(products=products_in_tf32)
    return LayerWeights(segments_from_parameters(parameters, layer.layout, workspace), routing)


def retained_routing(layer: MoELayer, weights: LayerWeights, retained: Tensor) -> dict[str, Tensor]:
    """Select the router tensors of the retained experts (N,), by their path inside the block."""
    return {r.path: retain(weights.routing[r.path], retained, r.dim) for r in layer.routing}


def layer_activation(layer: MoELayer) -> Activation:
    """Return the model's function from gate and up pre-activations (n, f) to neuron activations (n, f)."""
    experts = layer.experts
    if not layer.layout.gated:
        return lambda gate, up: experts.act_fn(up)
    if not hasattr(experts, "_apply_gate"):
        return lambda gate, up: experts.act_fn(gate) * up
    if layer.layout.interleaved:
        return lambda gate, up: experts._apply_gate(torch.stack([gate, up], dim=2).flatten(1))  # (n, 2f)
    return lambda gate, up: experts._apply_gate(torch.cat([gate, up], dim=1))  # (n, 2f)


@torch.no_grad()
def write_layer_(layer: MoELayer, weights: LayerWeights) -> None:
    """Replace a layer's experts and router in place, keeping the model's dtypes and devices.

    Args:
        layer: as found before compression; it may be written several times.
        weights: N experts and their router tensors.
    """
    _write_experts(layer, weights.segments)
    write_routing_(layer, weights.routing)
    for twin in layer.twins:
        _share(layer, twin)
        write_width_attributes_(twin, weights.segments.up.shape[1])


def write_routing_(layer: MoELayer, routing: Mapping[str, Tensor]) -> None:
    """Replace a layer's router in place; its experts have to be replaced by `write_layer_` before it can run."""
    first = layer.routing[0]
    before, after = first.tensor.shape[first.dim], routing[first.path].shape[first.dim]
    for entry in layer.routing:
        _replace(entry.module, entry.name, routing[entry.path])
    for block in (layer.block, *(twin.block for twin in layer.twins)):  # routers with groups use their count
        _replace_counts(block, {before, layer.num_experts}, after)


def release_experts_(layer: MoELayer) -> None:
    """Free the memory of a layer's experts, before `write_layer_` replaces them."""
    for name, parameter in layer.experts._parameters.items():
        if parameter is not None:
            empty = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            layer.experts._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)


def write_counts_(model: nn.Module, layers: list[MoELayer], num_experts: int) -> None:
    """Set the new expert count in the model's configs and in modules that store a copy of it.

    Args:
        model: all of its MoE layers have been written.
        layers: as found before compression.
        num_experts: N.
    """
    for config in {id(layer.config): layer.config for layer in layers}.values():
        before = next(layer.num_experts for layer in layers if layer.config is config)
        for module in model.modules():
            if _sizes(config, getattr(module, "config", None)):
                _replace_own_counts(module, {before}, num_experts)
        stored = config.to_dict()
        for key in COUNT_KEYS:
            if _is_count(stored.get(key), {before}):
                setattr(config, key, _recounted(stored[key], num_experts))


def _sizes(config: object, own: object) -> bool:
    """Return whether a module's own config is `config`, or a multimodal config whose text config it is."""
    return own is config or (hasattr(own, "get_text_config") and own.get_text_config() is config)


def _write_experts(layer: MoELayer, segments: Segments) -> None:
    """Replace the experts, one at a time, by parameters allocated by the segments' workspace."""
    parameters, written = layer.experts._parameters, {}
    for expert in range(len(segments.up)):
        one = parameters_from_segments(segments.select(slice(expert, expert + 1)), layer.layout)
        for name, value in one.items():
            if expert == 0:
                old, shape = parameters[name], (len(segments.up), *value.shape[1:])
                written[name] = segments.workspace.empty(shape, dtype=old.dtype, device=old.device)
            written[name][expert] = value[0]
    for name, value in written.items():
        parameters[name] = nn.Parameter(value, requires_grad=parameters[name].requires_grad)
    write_width_attributes_(layer, segments.up.shape[1])


def write_width_attributes_(layer: MoELayer, width: int) -> None:
    """Set the width that the experts module itself stores, where it does."""
    for name in WIDTH_ATTRIBUTES:
        if name in layer.experts.__dict__:
            setattr(layer.experts, name, width)


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    value = value.to(device=old.device, dtype=old.dtype).contiguous().clone()
    if name in module._buffers:
        module._buffers[name] = value
    else:
        module._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)


def _share(layer: MoELayer, twin: MoELayer) -> None:
    """Share the written tensors of a layer with a twin block."""
    twin.experts._parameters.update(layer.experts._parameters)
    for routing, other in zip(layer.routing, twin.routing, strict=True):
        setattr(other.module, other.name, routing.tensor)


def _replace_counts(block: nn.Module, before: set[int], after: int) -> None:
    for name, module in block.named_modules():
        if not name or name.split(".")[0] in ("gate", "router", "experts"):
            _replace_own_counts(module, before, after)


def _replace_own_counts(module: nn.Module, before: set[int], after: int) -> None:
    for name in COUNT_ATTRIBUTES:
        if _is_count(count := module.__dict__.get(name), before):
            setattr(module, name, _recounted(count, after))


def _is_count(value: object, counts: set[int]) -> bool:
    """Return whether a value is one of the counts, or a per-layer list that repeats one."""
    values = value if isinstance(value, list | tuple) else [value]
    return len(values) > 0 and all(isinstance(v, int) and v == values[0] for v in values) and values[0] in counts


def _recounted(value: object, count: int) -> int | list[int]:
    """Return the new count in the form of the old value, a number or a per-layer list."""
    return [count] * len(value) if isinstance(value, list | tuple) else count
