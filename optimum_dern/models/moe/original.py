"""Context managers that restore a layer's original tensors after it was compressed in place."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from .structure import MoELayer
from .view import write_routing_, write_width_attributes_


__all__ = ["original_kept", "restored_on_error"]


@contextmanager
def original_kept(layer: MoELayer) -> Iterator[None]:
    """Restore a layer's original tensors on exit; they are kept by reference, not copied.

    Args:
        layer: with its original experts, in memory or on the meta device.
    """
    restore_ = _keep(layer)
    try:
        yield
    finally:
        restore_()


@contextmanager
def restored_on_error(layers: Sequence[MoELayer]) -> Iterator[None]:
    """Restore the original tensors of all layers if the body fails or is interrupted."""
    restorers = [_keep(layer) for layer in layers]
    try:
        yield
    except BaseException:
        for restore_ in restorers:
            restore_()
        raise


def _keep(layer: MoELayer) -> Callable[[], None]:
    """Keep references to a layer's tensors; return a function that restores them."""
    blocks = (layer, *layer.twins)
    experts = [dict(block.experts._parameters) for block in blocks]
    routing = [[entry.tensor for entry in block.routing] for block in blocks]

    def restore_() -> None:
        write_routing_(layer, {entry.path: tensor for entry, tensor in zip(layer.routing, routing[0], strict=True)})
        for block, parameters, tensors in zip(blocks, experts, routing, strict=True):
            block.experts._parameters.update(parameters)
            write_width_attributes_(block, block.width)
            for entry, tensor in zip(block.routing, tensors, strict=True):
                setattr(entry.module, entry.name, tensor)

    return restore_
