"""Compress a model that is in memory as a whole, in place."""

from typing import Any

from ..config import DernConfig
from ..models.layer_counts import write_layer_counts_
from ..models.mode import evaluation_mode
from ..models.original import restored_on_error
from ..models.structure import MoELayer
from ..models.view import write_counts_
from ..reporting.report import LayerReport
from .budgets import find_layer_counts
from .layers import compress_layers_, compress_unseen_layers_
from .targets import Target


__all__ = ["compress_in_memory_"]


def compress_in_memory_(
    model: Any, layers: list[MoELayer], batches: list[dict], config: DernConfig, num_experts: int
) -> list[LayerReport]:
    """Compress a checked model; an error or interrupt puts it back as it was.

    Args:
        model: a causal language model.
        layers: its MoE layers.
        batches: calibration data; none where no token is needed.
        config: what to do.
        num_experts: N, on average where layers differ.

    Returns:
        One report a layer.
    """
    counts = None  # of layers that differ
    with evaluation_mode(model), restored_on_error(layers):
        if config.layer_budget == "error":
            counts = find_layer_counts(model, layers, batches, config, num_experts)
        targets = [Target(config, num_experts, layer_counts=counts)]
        if batches:
            (reports,) = compress_layers_(model, layers, batches, targets)
        else:
            (reports,) = compress_unseen_layers_(model, layers, targets)
    if counts is None:
        write_counts_(model, layers, num_experts)
    else:
        write_layer_counts_(model, layers, counts)
    return reports
