"""Parameters and bytes of a model, in memory or on the meta device."""

from math import prod

from torch import nn

from ..results.report import ModelSize
from .moe.sizes import expert_shapes, routing_shapes
from .moe.structure import MoELayer


__all__ = ["measure_model", "predict_size"]


def measure_model(model: nn.Module, layers: list[MoELayer]) -> ModelSize:
    """Count a model's parameters, its active parameters per token, and its bytes; tied weights count once."""
    total = sum(p.numel() for p in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    idle = 0
    for layer in layers:
        experts = sum(p.numel() for p in layer.experts.parameters(recurse=False))
        idle += experts // layer.num_experts * (layer.num_experts - layer.top_k)
    experts = sum(layer.num_experts for layer in layers) // max(1, len(layers))  # the mean, where layers differ
    return ModelSize(total, total - idle, size, experts, layers[0].width if layers else 0)


def predict_size(model: nn.Module, layers: list[MoELayer], num_experts: int, width: int | None = None) -> ModelSize:
    """Predict the result of `measure_model` for a model whose layers keep `num_experts` experts of `width` neurons."""
    before = measure_model(model, layers)
    parameters, active, size = before.parameters, before.active_parameters, before.bytes
    for layer in layers:
        experts, top_k = layer.experts._parameters, layer.top_k
        for name, shape in expert_shapes(layer, num_experts, width).items():
            count, one = prod(shape), prod(shape[1:])
            removed = experts[name].numel() - count
            parameters -= removed
            size -= removed * experts[name].element_size()
            active -= (experts[name].numel() // layer.num_experts - one) * top_k
        shapes = routing_shapes(layer, num_experts)
        for entry in layer.routing:
            removed = entry.tensor.numel() - prod(shapes[entry.path])
            if entry.is_parameter:
                parameters -= removed
                size -= removed * entry.tensor.element_size()
                active -= removed  # every token uses all router rows
    return ModelSize(parameters, active, size, num_experts, layers[0].width if width is None else width)
