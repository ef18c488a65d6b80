"""Parameters and bytes of a model, in memory or on the meta device."""

from torch import nn

from ..results.report import ModelSize
from .moe.structure import MoELayer


__all__ = ["measure_model", "predict_size"]


def measure_model(model: nn.Module, layers: list[MoELayer]) -> ModelSize:
    """Count a model's parameters, its active parameters per token, and its bytes; tied weights count once."""
    parameters = list({id(p): p for p in model.parameters()}.values())
    total = sum(p.numel() for p in parameters)
    idle = sum(expert_numel(layer) * (layer.num_experts - layer.top_k) for layer in layers)
    size = sum(p.numel() * p.element_size() for p in parameters)
    experts = sum(layer.num_experts for layer in layers) // max(1, len(layers))  # the mean, where layers differ
    return ModelSize(total, total - idle, size, experts)


def predict_size(model: nn.Module, layers: list[MoELayer], num_experts: int) -> ModelSize:
    """Predict the result of `measure_model` for a model whose layers keep `num_experts` experts."""
    before = measure_model(model, layers)
    removed = removed_bytes = 0
    for layer in layers:
        dropped = layer.num_experts - num_experts
        tensors = [*layer.experts.parameters(recurse=False), *(r.tensor for r in layer.routing if r.is_parameter)]
        removed += sum(t.numel() // layer.num_experts for t in tensors) * dropped
        removed_bytes += sum(t.numel() // layer.num_experts * t.element_size() for t in tensors) * dropped
    routing = sum(r.tensor.numel() // layer.num_experts for layer in layers for r in layer.routing if r.is_parameter)
    idle_routing = routing * (layers[0].num_experts - num_experts)  # router rows are used by every token
    return ModelSize(
        before.parameters - removed, before.active_parameters - idle_routing, before.bytes - removed_bytes, num_experts
    )


def expert_numel(layer: MoELayer) -> int:
    """Return the number of parameters of one routed expert."""
    return sum(p.numel() for p in layer.experts.parameters(recurse=False)) // layer.num_experts
