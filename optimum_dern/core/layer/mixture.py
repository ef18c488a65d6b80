"""Forward pass of a layer's experts: neuron activations, expert outputs and their routed sum.

The router's choice comes in as the tensors that the model itself hands to its experts (indices and weights per
token), so every router of every family is covered.  Work goes expert by expert and in chunks of tokens; no
(experts x tokens x width) tensor ever exists.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .segments import Segments
from .slots import slots_by_expert


__all__ = ["Activation", "Routing", "expert_batches", "neuron_activations", "routed_output"]

Activation = Callable[[Tensor | None, Tensor], Tensor]  # (gate, up) pre-activations (n, f) -> neurons (n, f)


class Routing(NamedTuple):
    """Hidden states and routing decisions of T tokens (without padding), as the experts of a layer receive them."""

    hidden: Tensor  # (T, d)
    index: Tensor  # (T, k) expert of each slot, all different for one token
    weight: Tensor  # (T, k) gate weight applied to the expert's output (or input, see below)
    weighs_input: bool = False  # an expert contributes e(w x), as in Llama 4, instead of w e(x)
    slots: tuple[Tensor, ...] | None = None  # of each expert, by `slots_by_expert`, where they are known

    def select(self, tokens: Tensor | slice) -> "Routing":
        """Select tokens by index, mask or slice."""
        if isinstance(tokens, Tensor) and tokens.dtype == torch.bool:
            tokens = tokens.nonzero().flatten()  # once instead of in each of the three
        return Routing(self.hidden[tokens], self.index[tokens], self.weight[tokens], self.weighs_input)

    def chunks(self, size: int, num_experts: int) -> Iterator["Routing"]:
        """Split the tokens into chunks of at most `size`; a GPU is asked once for the slots of all of them."""
        if len(self.index) <= size:
            yield self
            return
        for number, slots in enumerate(slots_by_expert(self.index.split(size), num_experts)):
            yield self.select(slice(number * size, (number + 1) * size))._replace(slots=slots)

    def inputs(self, token: Tensor, slot: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the expert inputs (n, d) of (token, slot) pairs, times the gate weights if these scale the inputs."""
        hidden = self.hidden[token].to(dtype)
        return self.weight[token, slot, None].to(dtype) * hidden if self.weighs_input else hidden

    def output_weights(self, token: Tensor, slot: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the factors (n, 1) of the expert outputs: gate weights, or ones if these scale the inputs."""
        weight = self.weight[token, slot, None].to(dtype)
        return torch.ones_like(weight) if self.weighs_input else weight

    @classmethod
    def concatenate(cls, parts: Sequence["Routing"]) -> "Routing":
        """Concatenate the routing of several batches of tokens of one layer."""
        tensors = zip(*(part[:3] for part in parts), strict=True)
        return cls(*map(torch.cat, tensors), parts[0].weighs_input)


class ExpertBatch(NamedTuple):
    """A chunk of the tokens routed to one expert, with the neuron activations."""

    expert: int
    token: Tensor  # (n,) row in the routing
    slot: Tensor  # (n,) which of the k choices
    weight: Tensor  # (n, 1) factor of the output
    neurons: Tensor  # (n, f) activations, not yet scaled by the weight


def neuron_activations(segments: Segments, expert: int, hidden: Tensor, activation: Activation) -> Tensor:
    """Compute the neuron activations h(x) = act(G x) * (U x) of one expert.

    Args:
        segments: the layer's experts.
        expert: which one.
        hidden: (n, d) inputs.
        activation: the model's own rule from gate and up pre-activations to neurons.

    Returns:
        (n, f).
    """
    hidden = expert_inputs(segments, hidden)
    with segments.workspace.products(hidden.device):
        gate = None if segments.gate is None else hidden @ segments.gate[expert].to(hidden.dtype).T  # (n, f)
        up = hidden @ segments.up[expert].to(hidden.dtype).T  # (n, f)
    return activation(gate, up)


def expert_inputs(segments: Segments, hidden: Tensor) -> Tensor:
    """Append a column of ones to the hidden states (n, d) if the last column of the gate and up rows is a bias."""
    return torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1) if segments.biased else hidden


def expert_batches(
    segments: Segments, routing: Routing, activation: Activation, experts: list[int] | None = None
) -> Iterator[ExpertBatch]:
    """Iterate over the tokens routed to each expert, one chunk at a time.

    Args:
        segments: N experts.
        routing: T tokens, indices below N.
        activation: as in `neuron_activations`.
        experts: only these; all by default.

    Yields:
        One `ExpertBatch` per chunk, in the dtype of the segments; experts without tokens yield nothing.
    """
    for expert, slots in _slots(routing, len(segments.up), experts):
        for part in slots.split(segments.workspace.chunk_tokens) if len(slots) else ():
            yield _run_chunk(segments, routing, activation, expert, part)  # and is not kept during the next


def _run_chunk(
    segments: Segments, routing: Routing, activation: Activation, expert: int, slots: Tensor
) -> ExpertBatch:
    """Compute an expert's neurons in some of the slots (n,) in which it is chosen."""
    top_k, dtype = routing.index.shape[1], segments.compute_dtype
    token, slot = slots // top_k, slots % top_k  # (n,), (n,)
    neurons = neuron_activations(segments, expert, routing.inputs(token, slot, dtype), activation)
    return ExpertBatch(expert, token, slot, routing.output_weights(token, slot, dtype), neurons)


def _slots(routing: Routing, num_experts: int, experts: list[int] | None) -> Iterable[tuple[int, Tensor]]:
    """Return the slots (n,) in which each expert is chosen, with the expert."""
    slots = routing.slots or next(slots_by_expert([routing.index], num_experts))
    return enumerate(slots) if experts is None else ((expert, slots[expert]) for expert in experts)


def expert_output(segments: Segments, batch: ExpertBatch) -> Tensor:
    """Compute the expert output e = D h (+ bias) of a batch, without its gate weight: (n, o)."""
    with segments.workspace.products(batch.neurons.device):
        output = batch.neurons @ segments.down[batch.expert].to(batch.neurons.dtype)
    return output if segments.output_bias is None else output + segments.output_bias[batch.expert]


def routed_output(segments: Segments, routing: Routing, activation: Activation) -> Tensor:
    """Compute the layer's routed output, the sum of the chosen experts' outputs with their gate weights.

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
        del batch  # before the next one is computed
    return total
