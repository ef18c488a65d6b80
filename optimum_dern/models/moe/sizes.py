"""Shapes that a layer's experts and router have with another number of experts, or with narrower ones."""

from collections.abc import Iterator

from .structure import MoELayer


__all__ = ["expert_shapes", "routing_shapes"]


def expert_shapes(layer: MoELayer, num_experts: int, width: int | None = None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the experts' parameters, by their names in the experts module.

    Args:
        layer: as found in the model.
        num_experts: N.
        width: neurons of an expert; by default as many as now.
    """
    width = layer.width if width is None else width
    return dict(_resized(layer, num_experts, width))


def routing_shapes(layer: MoELayer, num_experts: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the router's tensors with N experts, by their paths in the block."""
    shapes = {}
    for entry in layer.routing:
        shape = list(entry.tensor.shape)
        shape[entry.dim] = num_experts
        shapes[entry.path] = tuple(shape)
    return shapes


def _resized(layer: MoELayer, num_experts: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    transposed = layer.layout.transposed
    sizes = {  # of each parameter, the dimension of the neurons and its size
        "gate_up_proj": (2 if transposed else 1, 2 * width),
        "up_proj": (2 if transposed else 1, width),
        "gate_up_proj_bias": (1, 2 * width),
        "up_proj_bias": (1, width),
        "down_proj": (1 if transposed else 2, width),
    }
    for name, parameter in layer.experts._parameters.items():
        if parameter is not None:
            shape = [num_experts, *parameter.shape[1:]]
            if name in sizes:
                dim, size = sizes[name]
                shape[dim] = size
            yield name, tuple(shape)
