"""One layer on its way from E experts to N: write a candidate, and see how the router then sends the same tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..calibration.recording import record_routing, run_until_stopped
from ..core.mixture import Routing
from ..methods import Candidate
from ..models.structure import MoELayer
from ..models.view import LayerWeights, retained_routing, write_layer_


__all__ = ["LayerData", "LayerRewriter"]


@dataclass(frozen=True)
class LayerData:
    """What the calibration sequences show of one layer."""

    layer: MoELayer
    routing: Routing  # T real tokens, as the original router sends them
    held_out: Tensor  # (T,) bool: tokens that judge the candidates and are not fitted
    masks: Sequence[Tensor]  # per micro-batch, which tokens are real
    block_calls: Sequence[tuple[tuple, dict]]  # of the MoE block, to route again


@dataclass(frozen=True)
class LayerRewriter:
    """Writes candidates into a layer; the original weights stay at hand, so it can be done any number of times."""

    data: LayerData
    original: LayerWeights  # E experts
    retained: Tensor  # (N,)

    def write(self, candidate: Candidate) -> None:
        """Put a candidate's experts, and the router of the retained ones, into the model."""
        layer = self.data.layer
        routing = retained_routing(layer, self.original, self.retained)
        if candidate.router_rows is not None:
            routing[layer.router_weight.path] = candidate.router_rows
        write_layer_(layer, LayerWeights(candidate.segments, routing))

    def reroute(self, candidate: Candidate) -> Routing:
        """What the experts receive for the same inputs once the candidate is written (which this does)."""
        self.write(candidate)
        block = self.data.layer.block
        with record_routing(block, self.data.layer.experts, stop=True) as record:
            for args, kwargs in self.data.block_calls:
                run_until_stopped(block, *args, **kwargs)
        return record.without_padding(self.data.masks)
