"""Sums per neuron over the calibration tokens, from which the importance of neurons is computed.

h is a neuron's activation, w its column of the down projection, g the gate weight of its expert, and q the gradient of
the loss by the expert's output: g times the gradient by the layer's routed output.  Only products w . q are formed, so
no matrix of hidden size times hidden size is needed.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..layer.cost import Cost, LayerShape, experts_operations, held_by_chunk
from ..layer.mixture import Activation, ExpertBatch, Routing, expert_batches
from ..layer.reduction import Reduce
from ..layer.segments import Segments


__all__ = ["NeuronStatistics", "measure_neurons", "measure_neurons_cost"]


@dataclass(frozen=True)
class NeuronStatistics:
    """Sums over the tokens routed to each of E experts of f neurons, in float64, a maximum, and the columns' sizes."""

    count: Tensor  # (E, 1) tokens routed to the expert
    energy: Tensor  # (E, f) sum of (g h)^2
    peak: Tensor  # (E, f) largest (g h)^2
    curvature: Tensor  # (E, f) sum of (h w . q)^2; zero where no gradient was given
    sensitivity: Tensor  # (E, f) sum of |weight x gradient| over the neuron's weights; filled in at the end
    columns: Tensor  # (E, f) |w|^2, of the weights alone

    @classmethod
    def zeros(cls, segments: Segments) -> "NeuronStatistics":
        """Return the statistics of zero tokens."""
        experts, width = segments.up.shape[:2]
        device = segments.up.device

        def zeros(width: int) -> Tensor:
            return torch.zeros(experts, width, dtype=torch.float64, device=device)

        columns = torch.stack([down.double().square().sum(-1) for down in segments.down])  # one expert at a time
        return cls(zeros(1), *(zeros(width) for _ in range(4)), columns)

    def reduced(self, reduce: Reduce) -> "NeuronStatistics":
        """Combine the statistics of all processes."""
        operations = {f.name: "max" if f.name == "peak" else "sum" for f in fields(self) if f.name != "columns"}
        return replace(self, **{name: reduce(getattr(self, name), how) for name, how in operations.items()})


def measure_neurons(
    statistics: NeuronStatistics,
    segments: Segments,
    routing: Routing,
    activation: Activation,
    gradient: Tensor | None = None,
) -> None:
    """Add the tokens of one batch to the statistics, in place.

    Args:
        statistics: of the tokens so far.
        segments: E experts.
        routing: T tokens without padding.
        activation: the model's rule from pre-activations to neurons.
        gradient: (T, o) of the loss by the layer's routed output; None where no criterion needs it.
    """
    for batch in expert_batches(segments, routing, activation):
        squares = (batch.weight * batch.neurons).square()  # (n, f)
        statistics.count[batch.expert] += len(batch.token)
        statistics.energy[batch.expert] += squares.sum(0)
        largest = torch.maximum(statistics.peak[batch.expert], squares.amax(0).double())
        statistics.peak[batch.expert] = largest
        if gradient is not None:
            effect = batch.neurons * neuron_gradients(segments, batch, gradient)  # (n, f)
            statistics.curvature[batch.expert] += effect.square().sum(0)


def neuron_gradients(segments: Segments, batch: ExpertBatch, gradient: Tensor) -> Tensor:
    """Compute the gradient w . q of the loss by the neurons of a batch: (n, f).

    Args:
        segments: E experts.
        batch: n tokens of one of them.
        gradient: (T, o) of the loss by the layer's routed output.
    """
    dtype = batch.neurons.dtype
    by_output = batch.weight * gradient[batch.token].to(dtype)  # (n, o): q
    return by_output @ segments.down[batch.expert].to(dtype).T


def measure_neurons_cost(shape: LayerShape) -> Cost:
    """Cost of `measure_neurons` with gradients."""
    held = held_by_chunk(shape) + 8 * 6 * shape.experts * shape.width
    return Cost(held, 0, 2 * experts_operations(shape))
