"""Registry of compression methods, which turn one layer's weights and statistics into candidate layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from ..core.criteria.selection import Places
from ..core.dern.recombination import Map
from ..core.layer.cost import Cost, LayerShape
from ..core.layer.observation import ObservedLayer
from ..core.layer.segments import Segments
from ..core.merging.grouping import Grouping


if TYPE_CHECKING:
    from ..config import DernConfig
    from ..models.moe.structure import MoELayer


__all__ = ["METHODS", "Candidate", "LayerProblem", "Method", "get_method", "merged_candidates", "register_method"]


@dataclass(frozen=True)
class LayerProblem:
    """Input of a method: a layer of E experts, and which N of them are retained."""

    layer: ObservedLayer
    scores: Tensor  # (E,) saliency
    retained: Tensor  # (N,) ascending
    map_experts: Map = map  # like the builtin `map`, but may distribute experts over processes
    protected: tuple[int, ...] = ()  # experts that must be among the retained ones
    neurons: Tensor | None = None  # (E, f) importance of single neurons, where the config names one

    @property
    def places(self) -> Places:
        """The constraints on the retained experts: how many, in how many router groups, and which in any case."""
        return Places(len(self.retained), self.layer.num_groups, self.protected)


@dataclass(frozen=True)
class Candidate:
    """A proposed compressed layer."""

    segments: Segments  # N experts
    router_rows: Tensor | None = None  # (N, d); None: the retained experts' own rows
    facts: Mapping[str, object] = field(default_factory=dict)  # for the report, JSON-able
    retained: Tensor | None = None  # (N,) ascending, if other than the problem's; they keep their router tensors
    widths: Sequence[int] | None = None  # neurons of each expert, if zero weights stand in the place of some


class Method(Protocol):
    """A compression method; all but `compress_layer` may be left out, and then is what stands here."""

    needs_tokens: bool = True  # False if it needs only statistics and weights
    needs_router_logits: bool = False  # True if it needs a router matrix with the experts' inputs
    needs_beside: bool = False  # True if it needs what the block adds to the routed output, of its shared experts
    defaults: Mapping[str, object] = {}  # options of the config that its paper fixes; the user's values win
    keeps_experts: bool = False  # True if its candidates' experts are retained ones, which can be made narrower
    options: Sequence[str] | None = None  # config fields that only it reads, refused with other methods; None: any

    def compress_layer(self, problem: LayerProblem, config: "DernConfig") -> dict[str, Candidate]:
        """Return candidates by name, the method's own result last; without the guard, the last one is used."""

    def check(self, layers: Sequence["MoELayer"], count: int) -> None:
        """Refuse MoE layers, or a number of retained experts, that cannot work: ValueError, naming what is allowed."""

    def candidates(self, config: "DernConfig") -> tuple[int, int]:
        """Return the most candidates that the method proposes, and their most different sets of retained experts."""
        return 2, 2  # its own result, with its own retained experts, and plain pruning

    def costs(self, shape: LayerShape, config: "DernConfig") -> list[Cost]:
        """Return the costs of the method's steps in order, up to the copying of the retained experts."""
        return []


METHODS: dict[str, Method] = {}
ATTRIBUTES = (
    "needs_tokens",
    "needs_router_logits",
    "needs_beside",
    "keeps_experts",
    "defaults",
    "options",
    "check",
    "candidates",
    "costs",
)


def register_method(name: str) -> Callable[[type], type]:
    """Return a class decorator that registers a method for `DernConfig(method=name)`."""

    def register(cls: type) -> type:
        for attribute in ATTRIBUTES:
            if not hasattr(cls, attribute):
                setattr(cls, attribute, getattr(Method, attribute))
        METHODS[name] = cls()
        return cls

    return register


def get_method(name: str) -> Method:
    """Return the method registered under a name.

    Raises:
        ValueError: there is none.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose one of {', '.join(sorted(METHODS))}")
    return METHODS[name]


def merged_candidates(problem: LayerProblem, grouping: Grouping, merged: Segments) -> dict[str, Candidate]:
    """Return the pruned and the merged layer as candidates for the guard.

    Args:
        problem: a layer of E experts.
        grouping: of the experts into N groups.
        merged: N merged experts.

    Returns:
        The candidates.  A merged expert takes the router row, the biases and the place of its representative.
    """
    layer = problem.layer
    retained = grouping.retained.to(problem.retained.device)
    pruned = Candidate(layer.segments.select(problem.retained))
    if len(retained) == len(layer.segments.up):  # groups of one: nothing is merged
        return {"pruned": pruned}
    rows = None if layer.router_rows is None else layer.router_rows[retained]
    return {"pruned": pruned, "merged": Candidate(merged, rows, retained=retained)}
