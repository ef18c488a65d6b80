"""`TracedActivation`: an activation function through which gradients can be sent back, batch by batch."""

import torch
from torch import Tensor

from .mixture import Activation


__all__ = ["TracedActivation"]


class TracedActivation:
    """Activation that records its calls, to differentiate it with respect to the gate and up pre-activations.

    Args:
        activation: the model's rule from pre-activations to neurons.
    """

    def __init__(self, activation: Activation) -> None:
        self.activation = activation
        self.calls: list[tuple[Tensor, list[Tensor]]] = []

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        before = [part.detach().requires_grad_() for part in (gate, up) if part is not None]
        with torch.enable_grad():
            neurons = self.activation(*(before if gate is not None else (None, *before)))
        self.calls.append((neurons, before))
        return neurons.detach()

    def pull_back(self, call: int, by_neuron: Tensor) -> tuple[Tensor, ...]:
        """Backpropagate from the neurons to the pre-activations (n, f) each, and free the recorded call."""
        neurons, before = self.calls[call]
        self.calls[call] = ()
        return torch.autograd.grad(neurons, before, by_neuron)
