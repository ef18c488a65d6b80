"""A layer of experts, and what the calibration tokens show of it."""

from dataclasses import dataclass

from torch import Tensor

from .mixture import Activation, Routing
from .reduction import Reduce, alone
from .segments import Segments
from .statistics import ExpertStatistics


__all__ = ["ObservedLayer"]


@dataclass(frozen=True)
class ObservedLayer:
    """A layer with E experts before anything is changed; T tokens, those of this process, or none where none count."""

    segments: Segments  # E experts, as the model stores them
    activation: Activation
    routing: Routing  # T tokens without padding, as the original router sends them
    target: Tensor  # (T, o) the layer's routed output
    held_out: Tensor  # (T,) bool: tokens that judge the candidates; no fit may see them
    statistics: ExpertStatistics  # of the tokens of all processes
    router_rows: Tensor | None  # (E, d), where the router has one matrix
    reduce: Reduce = alone  # sums over the processes
    router_bias: Tensor | None = None  # (E,) added to the logits, where the router has one
    choice_bias: Tensor | None = None  # (E,) that only the choice of experts sees, where the router has one
    num_groups: int = 1  # of a group-limited router
    topk_group: int = 1  # of these, how many a token may use
    residual: Tensor | None = None  # (T, o) the residual stream before the experts, where it was asked for
    order: Tensor | None = None  # (T,) number of each token among those of all processes, where there are several
