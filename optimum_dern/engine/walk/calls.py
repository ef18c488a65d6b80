"""Recording of the arguments that a model calls its decoder layers with, without running any layer."""

import copy
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ...models.cache import CACHES
from ...models.forward import StopForward, replaced_forward, run_until_stopped
from .sharing import SharedTensors


__all__ = [
    "Call",
    "LayerState",
    "hands_on_gradients",
    "own_containers",
    "record_layer_calls",
    "replay_last_hidden",
    "replay_logits",
]


class Call(NamedTuple):
    """The arguments of one forward call of a decoder layer, hidden states apart from the others."""

    hidden: Tensor | None  # kept for the first layer only
    args: tuple
    kwargs: dict

    @classmethod
    def of(cls, args: tuple, kwargs: dict) -> "Call":
        if args:
            return cls(args[0], args[1:], dict(kwargs))
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return cls(kwargs["hidden_states"], (), rest)

    def without_cache(self) -> "Call":
        """Return the same call without its key-value cache, so that a layer can run several times."""
        args = tuple(None if isinstance(value, Cache) else value for value in self.args)
        found = {name: None for name, value in self.kwargs.items() if name in CACHES or isinstance(value, Cache)}
        return self._replace(args=args, kwargs=self.kwargs | found)


class LayerState(NamedTuple):
    """Placeholder in a recorded call for an output of the previous layer other than its hidden states."""

    output: int  # index among the previous layer's outputs


class LayerUnpacked(Exception):
    """Raised where the model unpacks a layer's output, which means that its layers return tuples."""


class LayerOutput(Tensor):
    """Tensor that raises `LayerUnpacked` when unpacked; a plain tensor would be split along its batch dimension."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # results of operations on it are plain tensors

    def __iter__(self):
        raise LayerUnpacked


@torch.no_grad()
def record_layer_calls(
    model: nn.Module, layers: nn.ModuleList, batches: Sequence[dict], keep: Callable[[Tensor], Tensor] = torch.detach
) -> list[list[Call]]:
    """Record the arguments of every decoder layer for every micro-batch, without running any layer.

    Each layer's masks, positions and other arguments are recorded as the model makes them, so that a layer called
    with them later computes what it would inside a forward pass of the whole model, causal mask and padding included.
    Where layers pass on more than hidden states (such as indices of sparse attention), a `LayerState` is recorded.

    Args:
        model: a causal language model.
        layers: its decoder layers.
        batches: keyword arguments of the model, one dict per micro-batch.
        keep: makes the copy of the hidden states that is kept.

    Returns:
        calls[layer][batch]; the hidden states of `calls[0]` are those that enter the first layer.
    """
    try:
        return _record(model, layers, batches, lambda hidden: hidden.as_subclass(LayerOutput), keep)
    except LayerUnpacked:
        return _record(model, layers, batches, lambda hidden: (hidden, LayerState(1)), keep)


def _record(
    model: nn.Module,
    layers: nn.ModuleList,
    batches: Sequence[dict],
    output: Callable[[Tensor], object],
    keep: Callable[[Tensor], Tensor],
) -> list[list[Call]]:
    """Record every layer's calls; `output` turns the hidden states that a layer gets into its stand-in output."""
    calls: list[list[Call]] = [[] for _ in layers]
    shared = SharedTensors()
    device = model.get_input_embeddings().weight.device

    def recorder(position: int) -> Callable:
        def forward(*args, **kwargs):
            call = Call.of(args, kwargs).without_cache()
            others = {name: shared.share(value) for name, value in call.kwargs.items()}
            hidden = None if position else keep(call.hidden)
            calls[position].append(Call(hidden, shared.share(call.args), others))
            if position + 1 == len(layers):
                raise StopForward
            return output(call.hidden)

        return forward

    with ExitStack() as stack:
        for position, layer in enumerate(layers):
            stack.enter_context(replaced_forward(layer, recorder(position)))
        for batch in batches:
            shared.next_batch()
            run_until_stopped(model, **{name: value.to(device) for name, value in batch.items()}, use_cache=False)
    return calls


def hands_on_gradients(calls: list[list[Call]]) -> bool:
    """Return whether layers write into containers that later ones read (Gemma 4), which a backward pass leaves out."""
    values = (value for layer in calls for call in layer for value in call.kwargs.values())
    return any(isinstance(value, MutableMapping | list) for value in values)


def own_containers(calls: list[list[Call]]) -> list[list[Call]]:
    """Copy the dicts and lists among the calls' arguments, which some layers write to for later ones (Gemma 4)."""
    copies: dict[int, object] = {}

    def own(value: object) -> object:
        return copies.setdefault(id(value), copy.copy(value)) if isinstance(value, MutableMapping | list) else value

    return [
        [call._replace(kwargs={name: own(value) for name, value in call.kwargs.items()}) for call in layer]
        for layer in calls
    ]


def replay_logits(model: nn.Module, layers: nn.ModuleList, inputs: dict, hidden: Tensor) -> Tensor:
    """Compute a model's logits from the output of its last decoder layer, without running any layer.

    Args:
        model: a causal language model.
        layers: its decoder layers.
        inputs: keyword arguments of the model.
        hidden: output of the last decoder layer; gradients flow back to it.
    """

    def logits(output: object) -> Tensor:
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(replaced_forward(layer, lambda *args, **kwargs: output))
            return model(**inputs, use_cache=False).logits

    try:
        return logits(hidden.as_subclass(LayerOutput))
    except LayerUnpacked:
        return logits((hidden, LayerState(1)))


replay_last_hidden = torch.no_grad()(replay_logits)
