"""CD-MoE (arXiv 2412.00069): condense every layer to a few experts that work on all tokens with fixed weights.

    y(x) = shared(x) + sum over S of w_i e_i(x),      w_i the mean gate weight of the tokens routed to expert i

A plain checkpoint can hold this where as many experts stay as a token uses: with a router of zero rows all of them
are chosen, each with the same weight u, and w_i / u goes into their down projections.  So the layers are dense in all
but name, and no code has to know.

The paper condenses only some layers, with a search for them, which `condensed_layers` asks for (`condensing`).  Here
all layers are condensed, since a config has one number of experts.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.layer.cost import Cost, LayerShape
from ..core.layer.observation import ObservedLayer
from ..core.merging.condense import condense_experts, condense_experts_cost, mean_weights
from ..core.router.choice import choose_experts, recognise_choice
from .registry import Candidate, LayerProblem, register_method


if TYPE_CHECKING:
    from ..config import DernConfig
    from ..models.moe.structure import MoELayer


@register_method("cd_moe")
class CdMoe:
    """The CD-MoE method, with shared and routed experts in every layer; proposes only the condensed layer."""

    needs_beside = True
    defaults = {"selection": "frequency"}
    options = ()

    def check(self, layers: Sequence["MoELayer"], count: int) -> None:
        layer = layers[0]
        if count != layer.top_k:
            raise ValueError(
                f"method='cd_moe' with {count} experts: in a plain checkpoint all experts of a condensed layer are "
                f"chosen for every token only if they are as many as a token uses; give num_experts={layer.top_k}"
            )
        if layer.topk_group < layer.num_groups:
            raise ValueError(
                f"method='cd_moe' needs a router that can choose all experts, but that of {layer.name} chooses among "
                f"those of {layer.topk_group} of {layer.num_groups} groups; choose another method"
            )

    def candidates(self, config: "DernConfig") -> tuple[int, int]:
        return 1, 1

    def costs(self, shape: LayerShape, config: "DernConfig") -> list[Cost]:
        found = condense_experts_cost(shape)
        beside = shape.number * shape.tokens * shape.outputs
        return [found._replace(held=found.held + beside)]

    def compress_layer(self, problem: LayerProblem, config: "DernConfig") -> dict[str, Candidate]:
        layer = problem.layer
        if layer.routing.weighs_input:
            raise ValueError("method='cd_moe' needs gate weights that scale outputs; these scale the experts' inputs")
        chosen = torch.tensor(sorted(condense_experts(layer, len(problem.retained), problem.protected)))
        factors = mean_weights(layer)[chosen] / _given_weights(layer, chosen)
        segments = layer.segments.select(chosen)
        scaled = {"down": segments.down * factors.view(-1, 1, 1).to(segments.down)}
        if segments.output_bias is not None:
            scaled["output_bias"] = segments.output_bias * factors.unsqueeze(1).to(segments.output_bias)
        rows = torch.zeros_like(layer.router_rows[: len(chosen)])
        return {"condensed": Candidate(segments._replace(**scaled), rows, retained=chosen.to(problem.retained.device))}


def _given_weights(layer: ObservedLayer, chosen: Tensor) -> Tensor:
    """Return the gate weights (N,) float64 that the router gives N experts if its rows are zero.

    Raises:
        UnknownRouter: its rules are not known.
    """
    choice, logits = recognise_choice(layer, layer.routing)
    zero = logits.new_zeros(1, len(chosen))
    if layer.router_bias is not None:
        zero = zero + layer.router_bias[chosen.to(layer.router_bias.device)].to(zero)
    index, weight = choose_experts(zero, choice._replace(bias=None, num_groups=1, topk_group=1), len(chosen))
    return weight[0, index[0].argsort()].double()
