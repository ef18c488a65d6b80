"""Predicted duration of a compression: operations counted from tensor shapes, divided by a rate measured briefly.

An estimate: it counts products of matrices only, and assumes that a third of the recombination's k-means iterations
run and that every step of the refits is tried.
"""

import time
from collections.abc import Sequence

import torch
from torch import nn

from ...config import DernConfig
from ...core.layer.cost import experts_operations
from ...machine.torch_state import finish
from ...models.moe.structure import MoELayer
from .condensing import condensing_operations
from .phases import layer_phases, result_shape


__all__ = ["count_operations", "measure_rate", "predict_seconds"]

PROBE_SIZE = 768  # as large as the products of small experts: large ones are faster, so this errs on the slow side
OVERHEAD = 1.5  # everything that is not a product of matrices


def predict_seconds(
    model: nn.Module, layers: Sequence[MoELayer], tokens: int, config: DernConfig, num_experts: int, rate: float
) -> float:
    """Predict the seconds that a compression takes, loading and writing aside.

    Args:
        model: its weights need not be loaded.
        layers: its MoE layers.
        tokens: number of calibration tokens.
        config: of the compression.
        num_experts: N, experts that each layer keeps.
        rate: operations per second, from `measure_rate`.
    """
    if config.condensed_layers is not None:
        return OVERHEAD * condensing_operations(model, layers, tokens, config) / rate
    return OVERHEAD * sum(count_operations(layer, tokens, config, num_experts) for layer in layers) / rate


def count_operations(layer: MoELayer, tokens: int, config: DernConfig, num_experts: int) -> float:
    """Count the operations of compressing one layer that keeps its router; a multiply-add counts as two."""
    shape = result_shape(layer, tokens, config, num_experts)
    attention = 8.0 * tokens * shape.inputs**2
    run = attention + experts_operations(shape)
    sequential = config.calibration_order == "sequential"
    walk = attention + (sequential + config.corrects_drift) * run  # measured; once compressed; in the original model
    return walk + sum(phase.operations for phase in layer_phases(shape, config))


def measure_rate(device: torch.device, seconds: float = 0.3) -> float:
    """Measure a device's rate of float32 matrix products, in operations per second, from the fastest of several runs.

    A mean over the runs would mistake a busy machine for a slow one.
    """
    matrix = torch.randn(PROBE_SIZE, PROBE_SIZE, device=device, generator=torch.Generator(device).manual_seed(0))
    matrix @ matrix
    finish([device])
    end, fastest = time.perf_counter() + seconds, float("inf")
    while (started := time.perf_counter()) < end or fastest == float("inf"):
        matrix @ matrix
        finish([device])
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * PROBE_SIZE**3 / fastest
