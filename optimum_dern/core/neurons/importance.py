"""Importance of neurons: one function per published criterion, returning (E, f) scores; larger is more important."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .statistics import NeuronStatistics


__all__ = ["IMPORTANCE", "Importance", "camera_p", "check_importance", "heapr", "slim", "super_neurons"]

PEAK_SHARE = 0.9  # of the largest value in CAMERA-P's score (the paper's r)
SUPER_SHARE = 0.1  # a super neuron's largest contribution, relative to the layer's largest
SUPER_MEDIAN = 100.0  # and relative to the median neuron's


@dataclass(frozen=True)
class Importance:
    """A criterion for neurons: its function, and the gradient that it needs."""

    function: Callable[[NeuronStatistics], Tensor]
    gradient_of: str | None = None  # the loss whose gradient is needed: "next token" or "teacher"; None for neither


def heapr(statistics: NeuronStatistics) -> Tensor:
    """Second-order effect of removing a neuron, mean over X_i of h^2 (w . q)^2 (HEAPr, arXiv 2509.22299).

    The paper writes w' G w with the Fisher matrix G (d, d) of the gradients q; this is the same without the matrix.
    """
    return statistics.curvature / statistics.count.clamp(min=1)


def camera_p(statistics: NeuronStatistics) -> Tensor:
    """Energy of a neuron's contribution, |w|^2 (0.1 sum (g h)^2 + 0.9 max (g h)^2) (CAMERA-P, arXiv 2508.02322)."""
    sums = (1 - PEAK_SHARE) * statistics.energy + PEAK_SHARE * statistics.peak
    return statistics.columns * sums


def slim(statistics: NeuronStatistics) -> Tensor:
    """Sensitivity, sum of |weight x gradient| over a neuron's weights (SlimMoE, arXiv 2506.18349).

    The gradient is that of the distillation loss on the teacher's eight largest logits.
    """
    return statistics.sensitivity


IMPORTANCE = {
    "heapr": Importance(heapr, "next token"),
    "camera_p": Importance(camera_p),
    "slim": Importance(slim, "teacher"),
}


def check_importance(name: str) -> None:
    """Raise ValueError for an unknown criterion for neurons."""
    if name not in IMPORTANCE:
        raise ValueError(f"unknown importance of neurons {name!r}; choose one of {', '.join(sorted(IMPORTANCE))}")


def super_neurons(statistics: NeuronStatistics) -> Tensor:
    """Find the few neurons whose largest contribution stands out of the layer: (E, f) bool.

    Removing a dozen such neurons of a million can ruin a model, however seldom they are active (arXiv 2606.05538).  A
    neuron's largest contribution is a = max |g h| |w|; it stands out if a is above a tenth of the layer's largest and
    above 100 times the median.
    """
    largest = (statistics.columns * statistics.peak).sqrt()
    reached = largest[largest > 0]
    if not len(reached):
        return torch.zeros_like(largest, dtype=torch.bool)
    return (largest > SUPER_SHARE * largest.max()) & (largest > SUPER_MEDIAN * reached.median())
