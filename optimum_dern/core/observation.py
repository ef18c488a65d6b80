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
    """A layer with E experts before anything is changed; T tokens, those of this process."""

    segments: Segments  # E experts, as the model stores them
    activation: Activation
    routing: Routing  # T tokens without padding, as the original router sends them
    target: Tensor  # (T, o) the layer's routed output
    held_out: Tensor  # (T,) bool: tokens that judge the candidates; no fit may see them
    statistics: ExpertStatistics  # of the tokens of all processes
    router_rows: Tensor | None  # (E, d), where the router has one matrix
    reduce: Reduce = alone  # sums over the processes
