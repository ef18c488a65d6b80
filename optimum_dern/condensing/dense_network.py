"""The dense network of a condensed layer: the neurons of its shared and chosen experts side by side.

    y(x) = shared(x) + sum over S of w_i e_i(x) = D act(G x) * (U x)

The rows of G and U are those of all these experts, and so are the columns of D, with the weights w_i in them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.layer.segments import Segments
from ..models.moe.overrides import takes_routing
from ..models.moe.structure import ROUTER_PARTS, MoELayer
from ..models.moe.view import layer_activation, read_layer
from .dense_form import PROJECTIONS


__all__ = ["check_condensable", "dense_width", "fill_", "joined_neurons", "shared_experts"]


def check_condensable(layer: MoELayer, network: nn.Module) -> None:
    """Refuse a layer whose shared and routed experts are not neurons of a dense network.

    Args:
        layer: a MoE layer; its weights need not be loaded.
        network: that would take its place.

    Raises:
        ValueError: naming what a dense network cannot hold.
    """
    shared_experts(layer)
    layout, reason = layer.layout, ""
    if not takes_routing(layer.experts):
        reason = "its gate weights scale the experts' inputs"
    elif layout.biased or not layout.gated:
        reason = "its experts have biases" if layout.biased else "its experts have no gate projection"
    else:
        gate, up = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
        same = torch.allclose(layer_activation(layer)(gate, up), network.act_fn(gate) * up)
        reason = "" if same else "its experts have another activation than dense layers"
    if reason:
        raise ValueError(f"{layer.name} cannot become a dense layer: {reason}")


def shared_experts(layer: MoELayer) -> nn.Module | None:
    """Find the shared experts of a block, one network; None where it has none.

    Raises:
        ValueError: the block has other parameters, such as a gate on the shared experts.
    """
    names = [name for name, _ in layer.block.named_parameters() if not _is_routed(layer, name)]
    paths = {name.removesuffix(f".{end}") for name in names for end in PROJECTIONS if name.endswith(f".{end}")}
    if not names:
        return None
    path = min(paths, default="")
    other = [name for name in names if name not in {f"{path}.{end}" for end in PROJECTIONS}]
    if other:
        raise ValueError(
            f"{layer.name} cannot become a dense layer: its block also has {', '.join(other)}, which a dense layer "
            "has no place for; method='cd_moe' with num_experts="
            f"{layer.top_k} condenses its routed experts alone"
        )
    return layer.block.get_submodule(path)


def dense_width(layer: MoELayer, count: int) -> int:
    """Return the neurons of a layer's shared experts and a number of its routed ones together."""
    shared = shared_experts(layer)
    return count * layer.width + (0 if shared is None else len(shared.gate_proj.weight))


def joined_neurons(layer: MoELayer, chosen: Sequence[int], weights: Tensor) -> Segments:
    """Put the neurons of a layer's shared and chosen experts side by side.

    Args:
        layer: with n neurons in its shared experts, and f in each routed one.
        chosen: experts S.
        weights: (E,) of all experts' outputs.

    Returns:
        One expert of n + |S| f neurons, in the compute dtype.
    """
    segments, shared = read_layer(layer).segments, shared_experts(layer)
    dtype = segments.compute_dtype
    gate, up, down = ([part[expert].to(dtype) for expert in chosen] for part in segments[:3])
    down = [weights[expert].to(dtype) * part for expert, part in zip(chosen, down, strict=True)]
    if shared is not None:
        own = (shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight.T)
        for parts, part in zip((gate, up, down), own, strict=True):
            parts.insert(0, part.detach().to(dtype))
    rows = [torch.cat(parts).unsqueeze(0) for parts in (gate, up, down)]
    return Segments(*rows, workspace=layer.workspace)


@torch.no_grad()
def fill_(network: nn.Module, neurons: Segments, layer: MoELayer) -> nn.Module:
    """Give a network the weights of some neurons; further neurons of it are zero.

    Args:
        network: with gate, up and down projections, on the meta device.
        neurons: of one expert.
        layer: whose dtype, device and mode it takes.

    Returns:
        The network.
    """
    down = layer.experts.down_proj
    network.to_empty(device=down.device).to(down.dtype).train(layer.block.training)
    for name, rows in zip(("gate_proj", "up_proj", "down_proj"), neurons[:3], strict=True):
        weight = network.get_submodule(name).weight
        weight.zero_().requires_grad_(down.requires_grad)
        (weight.T if name == "down_proj" else weight)[: len(rows[0])] = rows[0].to(weight)
    return network


def _is_routed(layer: MoELayer, name: str) -> bool:
    """Return whether a parameter of the block belongs to its routed experts or its router."""
    routed = layer.experts_name.removeprefix(f"{layer.name}.")
    router = name.partition(".")[0] in ROUTER_PARTS or name in {tensor.path for tensor in layer.routing}
    return router or name.startswith(f"{routed}.")
