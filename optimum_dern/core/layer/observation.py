"""A MoE layer together with its inputs, routing, outputs and statistics on the calibration tokens."""

from dataclasses import dataclass

from torch import Tensor

from .mixture import Activation, Routing
from .reduction import Reduce, alone
from .segments import Segments
from .statistics import ExpertStatistics


__all__ = ["ObservedLayer"]


@dataclass(frozen=True)
class ObservedLayer:
    """An uncompressed layer of E experts, observed on the T calibration tokens of this process (0 if none needed)."""

    segments: Segments  # E experts, as the model stores them
    activation: Activation
    routing: Routing  # T tokens without padding, as the original router sends them
    target: Tensor  # (T, o) the layer's routed output
    held_out: Tensor  # (T,) bool: tokens that evaluate the candidates and are excluded from every fit
    statistics: ExpertStatistics  # of the tokens of all processes
    router_rows: Tensor | None  # (E, d) router weight; None if the router is not a single matrix
    reduce: Reduce = alone  # sums over the processes
    router_bias: Tensor | None = None  # (E,) added to the logits, where the router has one
    choice_bias: Tensor | None = None  # (E,) bias that affects only the choice of experts, where the router has one
    num_groups: int = 1  # of a group-limited router
    topk_group: int = 1  # how many of these groups a token may use
    residual: Tensor | None = None  # (T, o) the residual stream before the experts, if requested
    beside: Tensor | None = None  # (T, o) what the block adds to the routed output (shared experts), if requested
    order: Tensor | None = None  # (T,) number of each token among those of all processes, where there are several
