"""Backward pass through a model of which one decoder layer is in memory: statistics of neurons that need gradients.

    forward:   layer after layer, the hidden states that enter each one are kept (in files, where the run keeps any)
    head:      loss of every sequence, and its gradient by the last hidden states
    backward:  in reverse, each layer runs once more on its inputs, and the gradient passes through it

In a MoE layer the gradient G by its routed output is read on the way; an expert's own is g G, so one matrix of tokens
times hidden size is enough for the gradients of all of its experts.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from logging import getLogger
from pathlib import Path

import torch
from torch import Tensor, nn

from ...core.layer.mixture import Routing
from ...core.neurons.sensitivity import add_weight_gradients_, sensitivity, zero_gradients
from ...core.neurons.statistics import NeuronStatistics, measure_neurons
from ...data.labels import real_tokens
from ...machine.processes import Processes
from ...machine.progress import progress_bar
from ...machine.scratch import CopiesInFiles
from ...models.moe.overrides import routing_hook
from ...models.moe.structure import MoELayer
from ...models.moe.view import layer_activation, read_layer
from ..measure.expert_run import chunked_experts
from .calls import Call, hands_on_gradients, own_containers, replay_logits
from .losses import LOSSES, Loss
from .stream import HiddenStream
from .walks import LayerProvider


__all__ = ["measure_gradients"]

logger = getLogger(__name__)


def measure_gradients(
    model: nn.Module,
    decoder_layers: nn.ModuleList,
    positions: Mapping[int, MoELayer],
    calls: list[list[Call]],
    loss: Loss,
    provider: LayerProvider,
    processes: Processes,
    device: torch.device,
    spill: Path | None = None,
) -> dict[int, NeuronStatistics]:
    """Measure the neurons of all MoE layers with the gradient of a loss, in one forward and one backward pass.

    Args:
        model: a causal language model in evaluation mode.
        decoder_layers: its decoder layers.
        positions: its MoE layers by the index of their decoder layer.
        calls: from `record_layer_calls`, for the micro-batches of this process.
        loss: which loss, and its sequences.
        provider: loads the decoder layers.
        processes: that share the sequences.
        device: of the layers' inputs.
        spill: folder for files of hidden states; in memory by default.

    Returns:
        Statistics of the tokens of all processes, by position.
    """
    if hands_on_gradients(calls):
        logger.warning(
            "layers of this model hand on more than hidden states to later ones; the gradient leaves these paths out"
        )
    stream, files = HiddenStream(own_containers(calls), None, device), None if spill is None else CopiesInFiles(spill)
    entering: list[tuple[list[Tensor], list[tuple]]] = []  # hidden states and other inputs of each layer
    for position in progress_bar(range(len(decoder_layers)), "Running layers forward"):
        if files is not None:
            stream.hidden = [files.copy(hidden) for hidden in stream.hidden]
        entering.append((list(stream.hidden), list(stream.states)))
        layer = positions.get(position)
        with provider.loaded(position), nullcontext() if layer is None else chunked_experts(layer):
            stream.step(position, decoder_layers[position])
    with provider.outside(head=True):
        pulls = [
            _by_last_hidden(model, decoder_layers, inputs, hidden.to(device), LOSSES[loss.of])
            for inputs, hidden in zip(loss.inputs, stream.hidden, strict=True)
        ]
    found: dict[int, NeuronStatistics] = {}
    for position in progress_bar(range(len(decoder_layers) - 1, -1, -1), "Running layers backward"):
        stream.hidden, stream.states = entering.pop()
        with provider.loaded(position), _measured(positions.get(position), loss) as neurons:
            for batch in range(len(pulls)):
                pulls[batch] = _pull_back(stream, position, decoder_layers[position], batch, pulls[batch], neurons)
                if files is not None:
                    files.unmap_pages()
            if neurons is not None:
                found[position] = neurons.result(processes)
    return found


def _by_last_hidden(model: nn.Module, layers: nn.ModuleList, inputs: dict, hidden: Tensor, loss) -> Tensor:
    """Compute the gradient of the loss by the output of the last decoder layer, one sequence at a time."""
    gradients = []
    for row in range(len(hidden)):
        one = {name: value[row : row + 1].to(hidden.device) for name, value in inputs.items()}
        with torch.enable_grad():
            last = hidden[row : row + 1].detach().requires_grad_()
            value = loss(replay_logits(model, layers, one, last), one["input_ids"], one["attention_mask"])
            gradients += torch.autograd.grad(value, last)
    return torch.cat(gradients)


def _pull_back(
    stream: HiddenStream, position: int, layer: nn.Module, batch: int, pull: Tensor, neurons: "_Neurons | None"
) -> Tensor:
    """Run a decoder layer on one micro-batch, and compute the gradient by its input from that by its output."""
    with torch.enable_grad():
        hidden = stream.hidden[batch].to(stream.device).detach().requires_grad_()
        output = stream.call(position, layer, batch, hidden)
        output = output[0] if isinstance(output, tuple) else output
        wanted = [hidden] if neurons is None else [hidden, neurons.output]
        by_hidden, *by_experts = torch.autograd.grad(output, wanted, pull.to(output))
    if neurons is not None:
        neurons.measure(batch, by_experts[0])
    return by_hidden


class _Neurons:
    """The statistics of a layer's neurons, filled in micro-batch by micro-batch."""

    def __init__(self, layer: MoELayer, loss: Loss) -> None:
        self.segments, self.activation = read_layer(layer).segments, layer_activation(layer)
        self.statistics = NeuronStatistics.zeros(self.segments)
        self.gradients = zero_gradients(self.segments) if loss.of == "teacher" else None
        self.masks = loss.masks
        self.routing: Routing | None = None  # of the running micro-batch
        self.output: Tensor | None = None  # and what its experts return

    @torch.no_grad()
    def measure(self, batch: int, gradient: Tensor) -> None:
        """Add the real tokens of a micro-batch, with the gradient (B S, o) by the experts' output."""
        real = real_tokens(self.masks[batch], gradient.device)
        routing, gradient = self.routing.select(real), gradient.flatten(0, -2)[real]
        measure_neurons(self.statistics, self.segments, routing, self.activation, gradient)
        if self.gradients is not None:
            add_weight_gradients_(self.gradients, self.segments, routing, self.activation, gradient)
        self.routing = self.output = None

    @torch.no_grad()
    def result(self, processes: Processes) -> NeuronStatistics:
        """Return the statistics of the tokens of all processes."""
        statistics = self.statistics.reduced(processes.reduce)
        if self.gradients is None:
            return statistics
        gradients = [processes.reduce(gradient) for gradient in self.gradients]
        return replace(statistics, sensitivity=sensitivity(self.segments, gradients))


@contextmanager
def _measured(layer: MoELayer | None, loss: Loss) -> Iterator[_Neurons | None]:
    """Record the routing and the output of a layer's experts while the context is open."""
    if layer is None:
        yield None
        return
    neurons = _Neurons(layer, loss)

    def receive(routing: Routing) -> None:
        neurons.routing = routing

    def after_experts(module: nn.Module, args: tuple, output: Tensor) -> None:
        neurons.output = output

    with ExitStack() as stack:
        handles = [
            routing_hook(layer.experts)(layer.block, layer.experts, receive),
            layer.experts.register_forward_hook(after_experts),
        ]
        for handle in handles:
            stack.callback(handle.remove)
        yield neurons
