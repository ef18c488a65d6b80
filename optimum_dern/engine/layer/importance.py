"""The importance of a measured layer's neurons, for the methods that choose among them or weigh them."""

from torch import Tensor

from ...config import DernConfig
from ...core.layer.observation import ObservedLayer
from ...core.neurons.importance import IMPORTANCE, super_neurons
from ...core.neurons.statistics import NeuronStatistics, measure_neurons
from ..measure.measured import MeasuredLayer


__all__ = ["gradient_needed", "neuron_statistics", "score_neurons"]


def gradient_needed(config: DernConfig) -> str | None:
    """Return the loss whose gradient the importance of neurons needs; None where forward passes are enough."""
    return None if config.importance is None else IMPORTANCE[config.importance].gradient_of


def neuron_statistics(measured: MeasuredLayer, observed: ObservedLayer, config: DernConfig) -> NeuronStatistics:
    """Return the statistics of a layer's neurons: those measured with gradients, or of its calibration tokens.

    Args:
        measured: the layer.
        observed: its view, with its original experts.
        config: names the importance.
    """
    loss = gradient_needed(config)
    if loss is not None:
        return measured.neurons[loss][measured.position]
    statistics = NeuronStatistics.zeros(observed.segments)
    measure_neurons(statistics, observed.segments, observed.routing, observed.activation)
    return statistics.reduced(observed.reduce)


def score_neurons(statistics: NeuronStatistics, config: DernConfig) -> tuple[Tensor, Tensor]:
    """Return the importance (E, f) of a layer's neurons, and which of them (E, f) must stay in any case."""
    return IMPORTANCE[config.importance].function(statistics), super_neurons(statistics)
