"""The arguments of every decoder layer's calls, recorded from the model without running any layer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..layer.recording import StopForward, run_until_stopped
from .sharing import SharedTensors


__all__ = ["Call", "LayerState", "record_layer_calls", "replaced_forward", "replay_last_hidden"]

CACHES = ("past_key_values", "cache")  # names of the argument before transformers 5.24 and since


class Call(NamedTuple):
    """The arguments of one forward call, hidden states apart."""

    hidden: Tensor | None  # kept of the first layer's call only
    args: tuple
    kwargs: dict

    @classmethod
    def of(cls, args: tuple, kwargs: dict) -> "Call":
        if args:
            return cls(args[0], args[1:], dict(kwargs))
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return cls(kwargs["hidden_states"], (), rest)

    def without_cache(self) -> "Call":
        """The same call for a layer that runs several times, and must not see its own keys and values again."""
        args = tuple(None if isinstance(value, Cache) else value for value in self.args)
        found = {name: None for name, value in self.kwargs.items() if name in CACHES or isinstance(value, Cache)}
        return self._replace(args=args, kwargs=self.kwargs | found)


class LayerState(NamedTuple):
    """Stands, in a recorded call, for what the layer before hands on besides its hidden states."""

    output: int  # which of that layer's outputs


class LayerUnpacked(Exception):
    """The model takes a layer's output apart: its layers return a tuple."""


class LayerOutput(Tensor):
    """Hidden states that tell if a model takes them for a tuple; a plain tensor would come apart along its batch."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # whatever is computed from it is a plain tensor

    def __iter__(self):
        raise LayerUnpacked


@torch.no_grad()
def record_layer_calls(
    model: nn.Module, layers: nn.ModuleList, batches: Sequence[dict], keep: Callable[[Tensor], Tensor] = torch.detach
) -> list[list[Call]]:
    """The arguments of every decoder layer for every micro-batch, without running any layer.

    Each layer's own masks, positions and other arguments are recorded as the model makes them, so a layer run later
    with other hidden states sees what it sees inside a whole-model forward: causal mask and padding included.  Where
    layers hand on more than hidden states (sparse attention that shares what it selects), a `LayerState` is recorded.

    Args:
        model: a causal language model.
        layers: its decoder layers.
        batches: keyword arguments of the model, one dict per micro-batch.
        keep: makes what is kept of the hidden states.

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
    """Record every layer's calls while `output` of the hidden states that it got stands for what it returns."""
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


@torch.no_grad()
def replay_last_hidden(model: nn.Module, layers: nn.ModuleList, inputs: dict, hidden: Tensor) -> Tensor:
    """The logits that a model gives where its decoder layers end with these hidden states; no layer runs.

    Args:
        model: a causal language model.
        layers: its decoder layers.
        inputs: keyword arguments of the model.
        hidden: what the last layer has returned.
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


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Give one module another forward while the context is open."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
