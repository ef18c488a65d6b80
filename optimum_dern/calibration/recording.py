"""What the layers of a model see: hooks that are always removed.

Routing is read from the arguments of the experts module (hidden states, indices, weights): exactly the tensors that
the model mixes its experts with, whatever its router does, and never from a router's output.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.mixture import Routing


__all__ = ["Call", "RoutingRecord", "record_layer_calls", "record_routing", "replaced_forward"]


class Call(NamedTuple):
    """The arguments of one forward call, hidden states apart."""

    hidden: Tensor
    args: tuple
    kwargs: dict

    @classmethod
    def of(cls, args: tuple, kwargs: dict) -> "Call":
        if args:
            return cls(args[0], args[1:], dict(kwargs))
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return cls(kwargs["hidden_states"], (), rest)


class StopForward(Exception):
    """Ends a forward pass that has seen enough."""


class RoutingRecord:
    """Per micro-batch: what the experts received, and the call of the block around them."""

    def __init__(self) -> None:
        self.routings: list[Routing] = []
        self.block_calls: list[tuple[tuple, dict]] = []

    def without_padding(self, masks: Sequence[Tensor]) -> Routing:
        """All micro-batches together, real tokens only.

        Args:
            masks: per micro-batch, (batch, sequence) bool, True for a real token.
        """
        kept = [r.select(mask.flatten().to(r.index.device)) for r, mask in zip(self.routings, masks, strict=True)]
        return Routing(*(torch.cat(parts) for parts in zip(*kept, strict=True)))


@contextmanager
def record_routing(block: nn.Module, experts: nn.Module, stop: bool = False) -> Iterator[RoutingRecord]:
    """Record every call of an experts module while the context is open.

    Args:
        block: the MoE block around the experts.
        experts: called as (hidden (T, d), indices (T, k), weights (T, k)).
        stop: raise `StopForward` instead of computing the experts.
    """
    record = RoutingRecord()

    def before_block(module: nn.Module, args: tuple, kwargs: dict) -> None:
        record.block_calls.append((args, kwargs))

    def before_experts(module: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden, index, weight = [*args, *kwargs.values()][:3]
        record.routings.append(Routing(hidden.detach().flatten(0, -2), index.detach(), weight.detach()))
        if stop:
            raise StopForward

    handles = [
        block.register_forward_pre_hook(before_block, with_kwargs=True),
        experts.register_forward_pre_hook(before_experts, with_kwargs=True),
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def record_layer_calls(model: nn.Module, layers: nn.ModuleList, batches: Sequence[dict]) -> list[list[Call]]:
    """The arguments of every decoder layer for every micro-batch, without running any layer.

    Each layer's own masks, positions and other arguments are recorded as the model makes them, so a layer run later
    with other hidden states sees what it sees inside a whole-model forward: causal mask and padding included.

    Args:
        model: a causal language model.
        layers: its decoder layers.
        batches: keyword arguments of the model, one dict per micro-batch.

    Returns:
        calls[layer][batch]; the hidden states are those that enter the first layer.
    """
    calls: list[list[Call]] = [[] for _ in layers]
    device = model.get_input_embeddings().weight.device

    def recorder(position: int) -> Callable:
        def forward(*args, **kwargs):
            call = Call.of(args, kwargs)
            calls[position].append(call)
            if position + 1 == len(layers):
                raise StopForward
            return call.hidden

        return forward

    with ExitStack() as stack:
        for position, layer in enumerate(layers):
            stack.enter_context(replaced_forward(layer, recorder(position)))
        for batch in batches:
            run_until_stopped(model, **{name: value.to(device) for name, value in batch.items()}, use_cache=False)
    return calls


def run_until_stopped(module: nn.Module, *args, **kwargs) -> None:
    """Call a module whose hooks may end the pass with `StopForward`."""
    try:
        module(*args, **kwargs)
    except StopForward:
        return


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
