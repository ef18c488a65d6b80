"""`MeasuredLayer`: a MoE layer with its calibration tokens, from the measurement to the rewritten weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ...core.layer.mixture import Routing
from ...core.layer.observation import ObservedLayer
from ...core.layer.statistics import ExpertStatistics
from ...core.router.rows import retain
from ...machine.processes import Processes
from ...methods import Candidate
from ...models.moe.structure import MoELayer
from ...models.moe.view import LayerWeights, layer_activation, read_layer, write_layer_, write_routing_
from .recording import record_routing, run_until_stopped


__all__ = ["Goal", "MeasuredLayer"]


class Goal(NamedTuple):
    """What refits aim at where that is not the layer's own output, for T tokens."""

    target: Tensor  # (T, o) each token times its weight
    token_weight: Tensor  # (T, 1) by which an error counts


@dataclass(frozen=True)
class MeasuredLayer:
    """A MoE layer with E experts and what T calibration tokens show of it; T is 0 where no token is needed."""

    layer: MoELayer
    position: int  # of its decoder layer
    routing: Routing  # T real tokens, as the original router sends them
    target: Tensor  # (T, o) the layer's routed output
    statistics: ExpertStatistics  # of the tokens of all processes
    held_out: Tensor  # (T,) bool: tokens that judge the candidates where there is a guard
    masks: Sequence[Tensor]  # per micro-batch, (batch, sequence) bool, True for a real token
    block_calls: Sequence[tuple[tuple, dict]]  # arguments of the MoE block per micro-batch, to route again
    order: Tensor  # (T,) number of each token among those of all processes
    router: Mapping[str, Tensor]  # router tensors of all E experts, by their path in the block
    processes: Processes  # that share the tokens
    residual: Tensor | None = None  # (T, d) the residual stream before the experts, where the criterion needs it
    goal: Goal | None = None  # what refits aim at, where that is not `target`

    def observe(self, held_out: Tensor) -> ObservedLayer:
        """What criteria and methods see of the layer; its segments are views of the model's parameters.

        Args:
            held_out: (T,) bool, tokens that no fit may see.
        """
        layer = self.layer
        rows, bias = layer.router_weight, layer.router_bias
        return ObservedLayer(
            segments=read_layer(layer).segments,
            activation=layer_activation(layer),
            routing=self.routing,
            target=self.target,
            held_out=held_out,
            statistics=self.statistics,
            router_rows=rows and self.router[rows.path],
            reduce=self.processes.reduce,
            router_bias=bias and self.router[bias.path],
            choice_bias=self._choice_bias(),
            num_groups=layer.num_groups,
            topk_group=layer.topk_group,
            residual=self.residual,
            order=self.order,
        )

    def router_of(self, candidate: Candidate) -> tuple[Tensor, Tensor | None] | None:
        """A candidate's router rows (N, d) and bias (N,); None where the router has no single matrix."""
        rows, bias = self.layer.router_weight, self.layer.router_bias
        if rows is None:
            return None
        tensors = self._router_tensors(candidate)
        return tensors[rows.path], bias and tensors[bias.path]

    def reroute(self, candidate: Candidate) -> Routing:
        """Route the same T tokens by a candidate's router, which is then in the model."""
        if not self.block_calls:  # no token is at hand
            return self.routing
        write_routing_(self.layer, self._router_tensors(candidate))
        with record_routing(self.layer.block, self.layer.experts, stop=True) as record:
            for args, kwargs in self.block_calls:
                run_until_stopped(self.layer.block, *args, **kwargs)
        return record.without_padding(self.masks)

    def write_(self, candidate: Candidate) -> None:
        """Put a candidate's experts and router into the model."""
        write_layer_(self.layer, LayerWeights(candidate.segments, self._router_tensors(candidate)))

    def _router_tensors(self, candidate: Candidate) -> dict[str, Tensor]:
        """The retained experts' entries of every router tensor, rows that the candidate brings instead of theirs."""
        tensors = {r.path: retain(self.router[r.path], candidate.retained, r.dim) for r in self.layer.routing}
        if candidate.router_rows is not None:
            tensors[self.layer.router_weight.path] = candidate.router_rows
        return tensors

    def _choice_bias(self) -> Tensor | None:
        """The one other number that the router has for each expert, such as DeepSeek-V3's correction of the load."""
        layer = self.layer
        added = layer.router_bias and layer.router_bias.path
        vectors = [r.path for r in layer.routing if r.tensor.numel() == layer.num_experts and r.path != added]
        return self.router[vectors[0]].flatten() if len(vectors) == 1 else None
