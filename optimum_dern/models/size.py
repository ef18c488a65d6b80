"""Parameters and bytes of a model, in memory or on the meta device."""

from torch import nn

from ..results.report import ModelSize
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
    return ModelSize(total, total - idle, size, experts)


def predict_size(model: nn.Module, layers: list[MoELayer], num_experts: int) -> ModelSize:
    """Predict the result of `measure_model` for a model whose layers keep `num_experts` experts."""
    before = measure_model(model, layers)
    parameters, active, size = before.parameters, before.active_parameters, before.bytes
    for layer in layers:
        dropped = layer.num_experts - num_experts
        routing = [entry.tensor for entry in layer.routing if entry.is_parameter]
        for tensor in [*layer.experts.parameters(recurse=False), *routing]:
            removed = tensor.numel() // layer.num_experts * dropped
            parameters -= removed
            size -= removed * tensor.element_size()
        active -= sum(t.numel() // layer.num_experts for t in routing) * dropped  # every token uses all router rows
    return ModelSize(parameters, active, size, num_experts)
