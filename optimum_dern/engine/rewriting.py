"""One layer on its way from E experts to N: write a candidate, and see how its router then sends the same tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..calibration.recording import record_routing, run_until_stopped
from ..core.mixture import Routing
from ..core.routing import retain
from ..core.statistics import ExpertStatistics
from ..methods import Candidate
from ..models.structure import MoELayer
from ..models.view import LayerWeights, write_layer_, write_routing_
from .drift import Drift


__all__ = ["LayerData", "LayerRewriter"]


@dataclass(frozen=True)
class LayerData:
    """What the calibration sequences show of one layer."""

    layer: MoELayer
    routing: Routing  # T real tokens, as the original router sends them
    target: Tensor  # (T, o) the layer's routed output
    statistics: ExpertStatistics  # of the tokens of all processes
    held_out: Tensor  # (T,) bool: tokens that judge the candidates and are not fitted
    masks: Sequence[Tensor]  # per micro-batch, which tokens are real
    block_calls: Sequence[tuple[tuple, dict]]  # of the MoE block, to route again
    residual: Tensor | None = None  # (T, d) the residual stream before the experts, where the criterion needs it
    goal: Tensor | None = None  # (T, o) what refits aim at, where that is not the target, each token times its weight
    token_weight: Tensor | None = None  # (T, 1)

    def making_up_for(self, drift: Drift | None, share: float) -> "LayerData":
        """The same, with refits that aim at this share of the drift as well."""
        if drift is None:
            return self
        weight = drift.token_weight.to(self.target)
        goal = (self.target + share * drift.error.to(self.target)) * weight
        return replace(self, goal=goal, token_weight=weight)


@dataclass(frozen=True)
class LayerRewriter:
    """Writes candidates into a layer, as often as need be."""

    data: LayerData
    routing: Mapping[str, Tensor]  # router tensors of all E experts
    retained: Tensor  # (N,) the experts that stay where a candidate does not say otherwise
    router_path: str | None  # of these, the matrix that a candidate may replace
    bias_path: str | None = None  # and the bias that belongs to it

    def write(self, candidate: Candidate) -> None:
        """Put a candidate's experts and router into the model."""
        write_layer_(self.data.layer, LayerWeights(candidate.segments, self._routing(candidate)))

    def router(self, candidate: Candidate) -> tuple[Tensor, Tensor | None] | None:
        """Rows (N, d) and bias (N,) with which a candidate is routed; None where the router has no single matrix."""
        if self.router_path is None:
            return None
        routing = self._routing(candidate)
        return routing[self.router_path], self.bias_path and routing[self.bias_path]

    def reroute(self, candidate: Candidate) -> Routing:
        """What the experts receive for the same inputs once the candidate's router is in place (which this does)."""
        if not self.data.block_calls:  # no token is at hand
            return self.data.routing
        write_routing_(self.data.layer, self._routing(candidate))
        block = self.data.layer.block
        with record_routing(block, self.data.layer.experts, stop=True) as record:
            for args, kwargs in self.data.block_calls:
                run_until_stopped(block, *args, **kwargs)
        return record.without_padding(self.data.masks)

    def _routing(self, candidate: Candidate) -> Mapping[str, Tensor]:
        retained = self.retained if candidate.retained is None else candidate.retained
        routing = {r.path: retain(self.routing[r.path], retained, r.dim) for r in self.data.layer.routing}
        if candidate.router_rows is not None:
            routing[self.router_path] = candidate.router_rows
        return routing
