"""Registry of the selection criteria, with the input that each of them needs.

Most criteria score each expert, and the N best are retained.  Two choose the set as a whole, because an expert's value
depends on which others are dropped: their scores are the cost of dropping each expert alone, and the retained experts
need not be the N of largest score.

A criterion's function is called with exactly the input that its `needs` names.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..layer.cost import Cost, LayerShape
from ..layer.observation import ObservedLayer
from . import saliency
from .greedy import greedy, greedy_cost
from .hope import hope
from .selection import Places, select_experts


__all__ = ["CRITERIA", "NEEDS", "Criterion", "check_criterion", "select"]

# From least to most; each includes those before it.  "residual" adds the tokens' residual stream.
NEEDS = ("nothing", "weights", "statistics", "tokens", "residual")


@dataclass(frozen=True)
class Criterion:
    """A selection criterion: its function and the input that it needs."""

    needs: str  # one of `NEEDS`
    function: Callable  # of (number of experts, seed), the segments, the statistics, or the observed layer
    chooses_set: bool = False  # True: takes `Places` too and returns (scores, retained); False: returns scores
    cost: Callable[[LayerShape], Cost] = lambda shape: Cost()


CRITERIA = {
    "router": Criterion("statistics", saliency.router),
    "frequency": Criterion("statistics", saliency.frequency),
    "ean": Criterion("statistics", saliency.ean),
    "reap": Criterion("statistics", saliency.reap),
    "man": Criterion("statistics", saliency.man),
    "msan": Criterion("statistics", saliency.msan),
    "mone": Criterion("statistics", saliency.mone),
    "hope": Criterion("statistics", hope, chooses_set=True),
    "easy_ep": Criterion("residual", saliency.easy_ep, cost=saliency.easy_ep_cost),
    "aimer": Criterion("weights", saliency.aimer),
    "random": Criterion("nothing", saliency.random),
    "greedy": Criterion("tokens", greedy, chooses_set=True, cost=greedy_cost),
}


def select(name: str, layer: ObservedLayer, places: Places, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Select the retained experts of a layer by a criterion.

    Args:
        name: a key of `CRITERIA`.
        layer: the observed layer; parts that the criterion does not need may be missing.
        places: how many experts are retained, in how many groups, and which are protected.
        seed: for "random".

    Returns:
        (E,) float64 scores, larger is more important, and (N,) int64 retained experts, ascending; the same in every
        process.

    Raises:
        ValueError: an unknown criterion, places that cannot be filled, scores that are not finite, or a router that
            the criterion cannot follow.
    """
    check_criterion(name)
    criterion = CRITERIA[name]
    if criterion.needs == "nothing":
        arguments = (len(layer.segments.up), seed)
    else:
        arguments = ({"weights": layer.segments, "statistics": layer.statistics}.get(criterion.needs, layer),)
    if criterion.chooses_set:
        return criterion.function(*arguments, places)
    scores = criterion.function(*arguments)
    return scores, select_experts(scores, *places)


def check_criterion(name: str) -> None:
    """Raise ValueError for an unknown selection criterion."""
    if name not in CRITERIA:
        raise ValueError(f"unknown selection criterion {name!r}; choose one of {sorted(CRITERIA)}")
