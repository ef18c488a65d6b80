"""Forward hooks that record how a MoE layer routes its tokens, removed at the end of a context.

Routing is read from the arguments of the experts module (hidden states, indices, weights): exactly the tensors that
the model mixes its experts with, whatever its router does.  `models.moe.overrides` has the exceptions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ...core.layer.mixture import Routing
from ...data.labels import real_tokens
from ...models.forward import StopForward
from ...models.moe.overrides import routing_hook


__all__ = ["RoutingRecord", "record_routing"]


class RoutingRecord:
    """The inputs and routing of the experts, per micro-batch."""

    def __init__(self) -> None:
        self.routings: list[Routing] = []

    def without_padding(self, masks: Sequence[Tensor], hidden: Tensor | None = None) -> Routing:
        """Concatenate the routing of all micro-batches, without padding tokens.

        Args:
            masks: per micro-batch, (batch, sequence) bool, True for a real token.
            hidden: (T, d) of the real tokens, where they are known already.
        """
        routings = self.routings if hidden is None else [r._replace(hidden=r.weight[:, :0]) for r in self.routings]
        kept = [r.select(real_tokens(mask, r.index.device)) for r, mask in zip(routings, masks, strict=True)]
        routing = Routing.concatenate(kept)
        return routing if hidden is None else routing._replace(hidden=hidden)


@contextmanager
def record_routing(block: nn.Module, experts: nn.Module, stop: bool = False) -> Iterator[RoutingRecord]:
    """Record every call of an experts module while the context is open.

    Args:
        block: the MoE block around the experts.
        experts: the experts module, of a kind that `models.moe.overrides` can read the routing of.
        stop: raise `StopForward` instead of computing the experts.
    """
    record = RoutingRecord()

    def receive(routing: Routing) -> None:
        record.routings.append(routing)
        if stop:
            raise StopForward

    handle = routing_hook(experts)(block, experts, receive)
    try:
        yield record
    finally:
        handle.remove()
