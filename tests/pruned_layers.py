"""Pruned layers measured by running them: their own router chooses among the experts that are left."""

from itertools import combinations

import torch

from optimum_dern.core.router.rows import retain
from optimum_dern.models.moe.structure import find_moe_layers
from optimum_dern.models.moe.view import LayerWeights, read_layer, write_layer_


def allowed_sets(experts, count, groups):
    """Sets of experts of which every group keeps the same number."""
    size = experts // groups
    for kept in combinations(range(experts), count):
        if all(sum(i // size == group for i in kept) == count // groups for group in range(groups)):
            yield kept


def recorded_block(model, rows):
    """The first MoE layer, what its block receives for some sequences, and what it returns."""
    layer, seen = find_moe_layers(model)[0], {}
    handle = layer.block.register_forward_hook(lambda module, args, output: seen.update(inputs=args[0], output=output))
    with torch.no_grad():
        model(torch.stack([row["input_ids"] for row in rows]))
    handle.remove()
    return layer, seen["inputs"], seen["output"]


@torch.no_grad()
def pruned_error(layer, kept, inputs, target):
    """|F - F_S| of the block with some experts only; the layer is put back."""
    original, retained = read_layer(layer), torch.tensor(kept)
    routing = {r.path: retain(original.routing[r.path], retained, r.dim) for r in layer.routing}
    write_layer_(layer, LayerWeights(original.segments.select(retained), routing))
    try:
        return (layer.block(inputs) - target).double().norm().item()
    finally:
        write_layer_(layer, original)
