"""`MeasuredLayer`: a MoE layer with its routing and outputs on the calibration tokens, used until it is rewritten."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ...core.layer.mixture import Routing
from ...core.layer.observation import ObservedLayer
from ...core.layer.statistics import ExpertStatistics
from ...core.neurons.statistics import NeuronStatistics
from ...core.router.rows import retain
from ...data.labels import TokenLabels
from ...machine.processes import Processes
from ...methods import Candidate
from ...models.forward import run_until_stopped
from ...models.moe.structure import MoELayer
from ...models.moe.view import LayerWeights, layer_activation, read_layer, write_layer_, write_routing_
from .recording import record_routing


__all__ = ["Goal", "KeptNeurons", "MeasuredLayer"]

# Indices (E, f) of the neurons that stay, by importance and width, then by the layer's position.
KeptNeurons = Mapping[tuple[str | None, int], Mapping[int, Tensor]]


class Goal(NamedTuple):
    """Target of the refits for T tokens, where it is not the layer's own output: formed for the tokens of a step."""

    error: Tensor  # (T, o) in the model's dtype, of which a share is added to the layer's output
    share: float
    token_weight: Tensor  # (T, 1) weight of each token's error

    def target(self, output: Tensor, tokens: Tensor) -> Tensor:
        """Return the output to reproduce, each token multiplied by its weight, from some tokens' own output (n, o)."""
        weight = self.token_weight[tokens].to(output)
        return (output + self.share * self.error[tokens].to(output)) * weight


@dataclass(frozen=True)
class MeasuredLayer:
    """A MoE layer of E experts with its routing, output and statistics on T calibration tokens; without data T is 0.

    It has the methods that route the tokens with a candidate's router and write a candidate into the model.
    """

    layer: MoELayer
    position: int  # index of its decoder layer
    routing: Routing  # T real tokens, routed by the original router
    target: Tensor  # (T, o) the layer's routed output
    statistics: ExpertStatistics  # of the tokens of all processes
    labels: TokenLabels  # on the CPU: sources of the tokens, and those held out, which the guard judges by
    masks: Sequence[Tensor]  # per micro-batch, (batch, sequence) bool, True for a real token
    block_calls: Sequence[tuple[tuple, dict]]  # arguments of the MoE block per micro-batch, to route tokens again
    order: Tensor  # (T,) index of each token among those of all processes
    router: Mapping[str, Tensor]  # router tensors of all E experts, by their path in the block
    processes: Processes  # that share the tokens
    residual: Tensor | None = None  # (T, d) the residual stream before the experts, where the criterion needs it
    neurons: Mapping[str, Mapping[int, NeuronStatistics]] = field(default_factory=dict)  # of all MoE layers, by the
    # loss whose gradient they are of, and the layer's position
    kept_neurons: KeptNeurons = field(default_factory=dict)  # where those of all layers share one budget
    goal: Goal | None = None  # target of the refits, where it is not `target`

    def observe(self, held_out: Tensor) -> ObservedLayer:
        """Make the view of the layer that criteria and methods get; its segments share the model's memory.

        Args:
            held_out: (T,) bool, tokens that must not be used for fitting.
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
        """Return a candidate's router rows (N, d) and bias (N,), or None where the router has no single matrix."""
        rows, bias = self.layer.router_weight, self.layer.router_bias
        if rows is None:
            return None
        tensors = self._router_tensors(candidate)
        return tensors[rows.path], bias and tensors[bias.path]

    def reroute(self, candidate: Candidate) -> Routing:
        """Route the same T tokens with a candidate's router, which is written into the model for that."""
        if not self.block_calls:  # there are no tokens
            return self.routing
        write_routing_(self.layer, self._router_tensors(candidate))
        with record_routing(self.layer.block, self.layer.experts, stop=True) as record:
            for args, kwargs in self.block_calls:
                run_until_stopped(self.layer.block, *args, **kwargs)
        return record.without_padding(self.masks, self.routing.hidden)

    def write_(self, candidate: Candidate) -> None:
        """Write a candidate's experts and router into the model."""
        write_layer_(self.layer, LayerWeights(candidate.segments, self._router_tensors(candidate)))

    def _router_tensors(self, candidate: Candidate) -> dict[str, Tensor]:
        """Return the router tensors of the retained experts, with the candidate's own router rows where it has any."""
        tensors = {r.path: retain(self.router[r.path], candidate.retained, r.dim) for r in self.layer.routing}
        if candidate.router_rows is not None:
            tensors[self.layer.router_weight.path] = candidate.router_rows
        return tensors

    def _choice_bias(self) -> Tensor | None:
        """Return the router's per-expert bias for choosing experts, as in DeepSeek-V3; None where it has none."""
        layer = self.layer
        added = layer.router_bias and layer.router_bias.path
        vectors = [r.path for r in layer.routing if r.tensor.numel() == layer.num_experts and r.path != added]
        return self.router[vectors[0]].flatten() if len(vectors) == 1 else None
