"""Measured error of pruned layers, by running them with the router restricted to the remaining experts."""

from itertools import combinations

import torch

from optimum_dern.core.router.rows import retain
from optimum_dern.models.moe.structure import find_moe_layers
from optimum_dern.models.moe.view import LayerWeights, read_layer, write_layer_


def allowed_sets(experts, count, groups):
    """List the sets of experts with the same number in every group."""
    size = experts // groups
    for kept in combinations(range(experts), count):
        if all(sum(i // size == group for i in kept) == count // groups for group in range(groups)):
            yield kept


def recorded_block(model, rows):
    """Run a model and record the first MoE block: returns the layer, its block's inputs and its outputs."""
    layer, seen = find_moe_layers(model)[0], {}
    handle = layer.block.register_forward_hook(lambda module, args, output: seen.update(inputs=args[0], output=output))
    with torch.no_grad():
        model(torch.stack([row["input_ids"] for row in rows]))
    handle.remove()
    return layer, seen["inputs"], seen["output"]


@torch.no_grad()
def pruned_error(layer, kept, inputs, target):
    """Measure |F - F_S| of the block with only the experts of S; the layer is restored."""
    original, retained = read_layer(layer), torch.tensor(kept)
    routing = {r.path: retain(original.routing[r.path], retained, r.dim) for r in layer.routing}
    write_layer_(layer, LayerWeights(original.segments.select(retained), routing))
    try:
        return (layer.block(inputs) - target).double().norm().item()
    finally:
        write_layer_(layer, original)
