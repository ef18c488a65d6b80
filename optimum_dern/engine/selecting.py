"""Which experts of a layer stay: what the criterion gets to see, and which experts are protected from it."""

from collections.abc import Iterable

from torch import Tensor

from ..config import DernConfig
from ..core.criteria import CRITERIA, NEEDS
from ..core.observation import ObservedLayer
from ..core.selection import Places
from ..core.super_experts import find_super_experts
from ..models.structure import MoELayer
from ..models.view import LayerWeights, layer_activation
from ..reporting.report import LayerReport
from .distributed import Processes
from .rewriting import LayerData


__all__ = ["find_places", "observe_layer", "selection_needs"]


def selection_needs(config: DernConfig) -> str:
    """What it takes to say which experts stay, one of `core.criteria.NEEDS`."""
    protection = "statistics" if config.protect_experts == "super" else "nothing"
    return max(CRITERIA[config.selection].needs, protection, key=NEEDS.index)


def observe_layer(
    data: LayerData, weights: LayerWeights, held_out: Tensor, order: Tensor, processes: Processes
) -> ObservedLayer:
    """What criteria and methods see of a layer.

    Args:
        data: what the calibration sequences show of it.
        weights: the layer as it is.
        held_out: (T,) bool, tokens that no fit may see.
        order: (T,) number of each token among those of all processes.
        processes: that share the tokens.
    """
    layer = data.layer
    rows, bias = layer.router_weight, layer.router_bias
    return ObservedLayer(
        segments=weights.segments,
        activation=layer_activation(layer),
        routing=data.routing,
        target=data.target,
        held_out=held_out,
        statistics=data.statistics,
        router_rows=rows and weights.routing[rows.path],
        reduce=processes.reduce,
        router_bias=bias and weights.routing[bias.path],
        choice_bias=_choice_bias(layer, weights),
        num_groups=layer.num_groups,
        topk_group=layer.topk_group,
        residual=data.residual,
        order=order,
    )


def find_places(
    data: LayerData, config: DernConfig, num_experts: int, position: int, earlier: Iterable[LayerReport] = ()
) -> Places:
    """How many experts of a layer stay, and which in any case.

    Args:
        data: of the layer.
        config: `protect_experts` names experts, or asks for those with outlier outputs.
        num_experts: N.
        position: of its decoder layer.
        earlier: reports of the MoE layers before it.
    """
    layer, protected = data.layer, config.protect_experts or {}
    if protected == "super":
        maxima = [report.largest_output for report in earlier]
        depth = position / layer.config.num_hidden_layers
        found = find_super_experts(data.statistics.output_max, maxima, depth, num_experts, layer.num_groups)
        return Places(num_experts, layer.num_groups, tuple(found))
    return Places(num_experts, layer.num_groups, tuple(protected.get(position, ())))


def _choice_bias(layer: MoELayer, weights: LayerWeights) -> Tensor | None:
    """The one other number that the router has for each expert, such as DeepSeek-V3's correction of the load."""
    added = layer.router_bias and layer.router_bias.path
    vectors = [r.path for r in layer.routing if r.tensor.numel() == layer.num_experts and r.path != added]
    return weights.routing[vectors[0]].flatten() if len(vectors) == 1 else None
