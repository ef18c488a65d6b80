"""What a layer's experts compute: neuron activations, expert outputs and their routed sum.

The router's choice comes in as the tensors that the model itself hands to its experts (indices and weights per
token), so every router of every family is covered.  Work goes expert by expert and in chunks of tokens; no
(experts x tokens x width) tensor ever exists.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .segments import Segments


__all__ = ["Activation", "Routing", "expert_batches", "neuron_activations", "routed_output"]

Activation = Callable[[Tensor | None, Tensor], Tensor]  # (gate, up) pre-activations (n, f) -> neurons (n, f)


class Routing(NamedTuple):
    """What the experts of a layer receive for T tokens (padding already removed)."""

    hidden: Tensor  # (T, d)
    index: Tensor  # (T, k) expert of each slot, all different for one token
    weight: Tensor  # (T, k) weight that the model applies to its output (or input, see below)
    weighs_input: bool = False  # an expert contributes e(w x), as in Llama 4, instead of w e(x)

    def select(self, tokens: Tensor | slice) -> "Routing":
        """Some of the tokens, by index, mask or slice."""
        return self._replace(hidden=self.hidden[tokens], index=self.index[tokens], weight=self.weight[tokens])

    def inputs(self, token: Tensor, slot: Tensor, dtype: torch.dtype) -> Tensor:
        """What the experts in these slots (n,) of these tokens (n,) read: (n, d)."""
        hidden = self.hidden[token].to(dtype)
        return self.weight[token, slot, None].to(dtype) * hidden if self.weighs_input else hidden

    def output_weights(self, token: Tensor, slot: Tensor, dtype: torch.dtype) -> Tensor:
        """What their outputs are multiplied by: (n, 1), ones where the weight is in the inputs."""
        weight = self.weight[token, slot, None].to(dtype)
        return torch.ones_like(weight) if self.weighs_input else weight

    @classmethod
    def concatenate(cls, parts: Sequence["Routing"]) -> "Routing":
        """The tokens of several parts of one layer, in order."""
        tensors = zip(*(part[:3] for part in parts), strict=True)
        return cls(*map(torch.cat, tensors), parts[0].weighs_input)


class ExpertBatch(NamedTuple):
    """Tokens that one expert processes, at most a chunk of the workspace's size."""

    expert: int
    token: Tensor  # (n,) row in the routing
    slot: Tensor  # (n,) which of the k choices
    weight: Tensor  # (n, 1) of the output
    neurons: Tensor  # (n, f) activations, before the weight


def neuron_activations(segments: Segments, expert: int, hidden: Tensor, activation: Activation) -> Tensor:
    """h(x) = act(G x) * (U x) of one expert.

    Args:
        segments: the layer's experts.
        expert: which one.
        hidden: (n, d) inputs.
        activation: the model's own rule from gate and up pre-activations to neurons.

    Returns:
        (n, f).
    """
    hidden = expert_inputs(segments, hidden)
    gate = None if segments.gate is None else hidden @ segments.gate[expert].to(hidden.dtype).T  # (n, f)
    return activation(gate, hidden @ segments.up[expert].to(hidden.dtype).T)


def expert_inputs(segments: Segments, hidden: Tensor) -> Tensor:
    """What gate and up rows multiply: (n, d), with a column of ones where their last column is a bias."""
    return torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1) if segments.biased else hidden


def expert_batches(
    segments: Segments, routing: Routing, activation: Activation, experts: list[int] | None = None
) -> Iterator[ExpertBatch]:
    """Walk over the tokens of each expert, a chunk at a time.

    Args:
        segments: N experts.
        routing: T tokens, indices below N.
        activation: as in `neuron_activations`.
        experts: only these; all by default.

    Yields:
        One `ExpertBatch` per chunk, in the dtype of the segments; experts without tokens yield nothing.
    """
    dtype, chunk = segments.compute_dtype, segments.workspace.chunk_tokens
    for expert in range(len(segments.up)) if experts is None else experts:
        tokens, slots = torch.where(routing.index == expert)  # (n,), (n,)
        for token, slot in zip(tokens.split(chunk), slots.split(chunk), strict=True):
            if len(token):
                hidden = routing.inputs(token, slot, dtype)
                neurons = neuron_activations(segments, expert, hidden, activation)
                yield ExpertBatch(expert, token, slot, routing.output_weights(token, slot, dtype), neurons)


def expert_output(segments: Segments, batch: ExpertBatch) -> Tensor:
    """e = D h (+ bias) of the batch's expert on its inputs, before the weight of the output: (n, o)."""
    output = batch.neurons @ segments.down[batch.expert].to(batch.neurons.dtype)
    return output if segments.output_bias is None else output + segments.output_bias[batch.expert]


def routed_output(segments: Segments, routing: Routing, activation: Activation) -> Tensor:
    """y(x) = sum over the chosen experts of weight times output, or of the output for the weighted input.

    Args:
        segments: N experts.
        routing: T tokens.
        activation: as in `neuron_activations`.

    Returns:
        (T, o) in the dtype of the segments.
    """
    shape = len(routing.hidden), segments.down.shape[-1]
    total = segments.down.new_zeros(shape, dtype=segments.compute_dtype)
    for batch in expert_batches(segments, routing, activation):
        total.index_add_(0, batch.token, batch.weight * expert_output(segments, batch))
    return total
