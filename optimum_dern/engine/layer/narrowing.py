"""Make the experts of a layer's candidates narrower: the same neurons of an expert go in all of them."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ...config import DernConfig
from ...core.layer.observation import ObservedLayer
from ...core.neurons.importance import IMPORTANCE, super_neurons
from ...core.neurons.selection import narrow, select_neurons
from ...core.neurons.statistics import NeuronStatistics, measure_neurons
from ...methods import Candidate
from ...models.moe.structure import MoELayer
from ...models.width import resolve_width


__all__ = ["find_width", "gradient_needed", "narrow_candidates"]


def find_width(layer: MoELayer, config: DernConfig) -> int:
    """Determine how many neurons every expert of a layer keeps."""
    return resolve_width(layer, config.width, config.width_sparsity, config.width_multiple_of)


def gradient_needed(config: DernConfig) -> str | None:
    """Return the loss whose gradient the importance of neurons needs; None where forward passes are enough."""
    return IMPORTANCE[config.importance].gradient_of if config.narrows else None


def narrow_candidates(
    candidates: Mapping[str, Candidate],
    observed: ObservedLayer,
    neurons: Mapping[str, NeuronStatistics],
    config: DernConfig,
    width: int,
) -> dict[str, Candidate]:
    """Keep the most important neurons of every expert, in all candidates.

    Args:
        candidates: whose experts are retained ones, as they are in the layer.
        observed: the layer of E experts, on the calibration tokens.
        neurons: statistics measured with gradients, by the loss.
        config: names the importance.
        width: number of neurons that every expert keeps.
    """
    loss = gradient_needed(config)
    statistics = _measure(observed) if loss is None else neurons[loss]
    kept = _select(observed, statistics, config.importance, width)  # (E, width)
    return {
        name: replace(candidate, segments=narrow(candidate.segments, kept[candidate.retained.to(kept.device)]))
        for name, candidate in candidates.items()
    }


def _select(observed: ObservedLayer, statistics: NeuronStatistics, importance: str, width: int) -> Tensor:
    scores = IMPORTANCE[importance].function(statistics, observed.segments)
    return select_neurons(scores, width, super_neurons(statistics, observed.segments))


def _measure(observed: ObservedLayer) -> NeuronStatistics:
    statistics = NeuronStatistics.zeros(observed.segments)
    measure_neurons(statistics, observed.segments, observed.routing, observed.activation)
    return statistics.reduced(observed.reduce)
