"""A layer's original tensors, kept while compressed ones take their place."""

from collections.abc import Iterator
from contextlib import contextmanager

from .structure import MoELayer
from .view import write_routing_


__all__ = ["original_kept"]


@contextmanager
def original_kept(layer: MoELayer) -> Iterator[None]:
    """Give a layer the very tensors back that it had when the context was entered; nothing is copied.

    Args:
        layer: with its original experts, in memory or on the meta device.
    """
    blocks = (layer, *layer.twins)
    experts = [dict(block.experts._parameters) for block in blocks]
    routing = [[entry.tensor for entry in block.routing] for block in blocks]
    try:
        yield
    finally:
        write_routing_(layer, {entry.path: tensor for entry, tensor in zip(layer.routing, routing[0], strict=True)})
        for block, parameters, tensors in zip(blocks, experts, routing, strict=True):
            block.experts._parameters.update(parameters)
            for entry, tensor in zip(block.routing, tensors, strict=True):
                setattr(entry.module, entry.name, tensor)
