"""Every selection criterion by name: what it needs to see, and how it decides which experts stay.

Most criteria score each expert, and the best stay.  Two choose a whole set, because what an expert is worth depends on
which others go: their scores say what dropping each expert alone would cost, and the N largest are not the ones kept.

A criterion's function gets exactly what it says it needs, so what a table promises here is what it can read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..layer.cost import Cost, LayerShape
from ..layer.observation import ObservedLayer
from . import saliency
from .greedy import greedy, greedy_cost
from .hope import hope
from .selection import Places, select_experts


__all__ = ["CRITERIA", "NEEDS", "Criterion", "Selection", "check_criterion", "select"]

# From least to most; each includes those before it.  "residual" is the residual stream of the tokens besides.
NEEDS = ("nothing", "weights", "statistics", "tokens", "residual")


@dataclass(frozen=True)
class Criterion:
    """A way to decide which experts stay."""

    needs: str  # one of `NEEDS`
    function: Callable  # of the number of experts and a seed; the segments; the statistics; or the observed layer
    chooses_set: bool = False  # gets the `Places` as well, and gives scores and retained experts; else only scores
    cost: Callable[[LayerShape], Cost] = lambda shape: Cost()


class Selection(NamedTuple):
    """What a criterion decided for one layer of E experts."""

    scores: Tensor  # (E,) float64, larger is more important
    retained: Tensor  # (N,) int64, ascending


CRITERIA = {
    "router": Criterion("statistics", saliency.router),
    "frequency": Criterion("statistics", saliency.frequency),
    "ean": Criterion("statistics", saliency.ean),
    "reap": Criterion("statistics", saliency.reap),
    "man": Criterion("statistics", saliency.man),
    "msan": Criterion("statistics", saliency.msan),
    "hope": Criterion("statistics", hope, chooses_set=True),
    "easy_ep": Criterion("residual", saliency.easy_ep, cost=saliency.easy_ep_cost),
    "aimer": Criterion("weights", saliency.aimer),
    "random": Criterion("nothing", saliency.random),
    "greedy": Criterion("tokens", greedy, chooses_set=True, cost=greedy_cost),
}


def select(name: str, layer: ObservedLayer, places: Places, seed: int = 0) -> Selection:
    """Decide which experts of a layer stay.

    Args:
        name: a key of `CRITERIA`.
        layer: of it, what the criterion does not need may be missing.
        places: how many stay, in how many groups, and which in any case.
        seed: for "random".

    Returns:
        Scores and retained experts, the same in every process.

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
        return Selection(*criterion.function(*arguments, places))
    scores = criterion.function(*arguments)
    return Selection(scores, select_experts(scores, *places))


def check_criterion(name: str) -> None:
    """Raise ValueError for a criterion that does not exist."""
    if name not in CRITERIA:
        raise ValueError(f"unknown selection criterion {name!r}; choose one of {sorted(CRITERIA)}")
