"""How long a compression will take: its arithmetic, counted from shapes, over a rate that is measured for a moment.

An estimate: it counts products of matrices only, and assumes that a third of the recombination's k-means iterations
run and that every step of the refits is tried.
"""

import time
from collections.abc import Sequence

import torch

from ...config import DernConfig
from ...core.layer.cost import experts_operations
from ...models.moe.structure import MoELayer
from .phases import layer_phases, layer_shape


__all__ = ["count_operations", "measure_rate", "predict_seconds"]

PROBE_SIZE = 768  # as large as the products of small experts: large ones are faster, so this errs on the slow side
OVERHEAD = 1.5  # everything that is not a product of matrices


def predict_seconds(
    layers: Sequence[MoELayer], tokens: int, config: DernConfig, num_experts: int, rate: float
) -> float:
    """Seconds that all layers take.

    Args:
        layers: MoE layers; weights need not be there.
        tokens: of the calibration data.
        config: what is done to a layer.
        num_experts: N.
        rate: operations per second, of `measure_rate`.
    """
    return OVERHEAD * sum(count_operations(layer, tokens, config, num_experts) for layer in layers) / rate


def count_operations(layer: MoELayer, tokens: int, config: DernConfig, num_experts: int) -> float:
    """Floating-point operations of one layer, a multiplication and an addition being two."""
    shape = layer_shape(layer, tokens, num_experts)
    attention = 8.0 * tokens * shape.inputs**2
    walk = 2 * attention + experts_operations(shape)  # seen, and run once compressed
    walk += config.corrects_drift * 2 * (experts_operations(shape) + attention)  # the original, in both streams
    return walk + sum(phase.operations for phase in layer_phases(shape, config))


def measure_rate(device: torch.device, seconds: float = 0.3) -> float:
    """Operations per second of float32 matrix products on a device: the fastest of those that fit into a moment.

    Their mean would tell how busy the machine is just now, and take it for its speed.
    """
    matrix = torch.randn(PROBE_SIZE, PROBE_SIZE, device=device, generator=torch.Generator(device).manual_seed(0))
    matrix @ matrix
    _finish(device)
    end, fastest = time.perf_counter() + seconds, float("inf")
    while (started := time.perf_counter()) < end or fastest == float("inf"):
        matrix @ matrix
        _finish(device)
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * PROBE_SIZE**3 / fastest


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
