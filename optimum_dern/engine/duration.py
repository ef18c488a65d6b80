"""How long a compression will take: its arithmetic, counted from shapes, over a rate that is measured for a moment.

An estimate: it counts products of matrices only, and assumes that a third of the recombination's k-means iterations
run and that every step of the refits is tried.
"""

import time
from collections.abc import Sequence

import torch

from ..config import DernConfig
from ..core.neuron_refit import count_passes
from ..models.structure import MoELayer
from .positions import enough_tokens


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
    parts = 2 if layer.layout.gated else 1
    shape = layer.experts.down_proj.shape
    width, size = (shape[1], shape[2]) if layer.layout.transposed else (shape[2], shape[1])
    routed = 2.0 * tokens * layer.top_k * width * size  # one projection of all tokens' experts
    experts, attention = (parts + 1) * routed, 8.0 * tokens * size**2
    total = 2 * experts + 2 * attention  # measured, and run once compressed
    total += config.corrects_drift * 2 * (experts + attention)  # the original, and behind compressed layers
    if config.method == "dern":
        dropped, pool = layer.num_experts - num_experts, width * layer.num_experts / num_experts
        total += 2.0 * dropped * width * num_experts * width * 2 * size
        total += 2.0 * num_experts * pool * width * (parts + 1) * size * config.cluster_iterations / 3
    if config.refit:
        fitted = min(tokens, enough_tokens(num_experts * width, layer.top_k)) if config.neuron_refit else tokens
        share = fitted / max(tokens, 1)
        gram = 2.0 * fitted * layer.top_k * width**2 + num_experts * width**3 / 3
        candidates = 2 if config.method == "dern" and config.guard else 1
        total += candidates * (gram + share * (experts + 2 * config.refit_sweeps * routed))
        total += config.router_refit * (gram + share * (experts + 2 * routed))
        total += config.neuron_refit * count_passes(tokens) * 3 * experts
    return total


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
