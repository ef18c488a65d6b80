"""The method registry: a method turns one layer's weights and statistics into candidates for the compressed layer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..config import DernConfig
from ..core.observation import ObservedLayer
from ..core.recombination import Map
from ..core.segments import Segments


__all__ = ["METHODS", "Candidate", "LayerProblem", "Method", "get_method", "register_method"]


@dataclass(frozen=True)
class LayerProblem:
    """What a method gets to see of a layer with E experts, N of which stay."""

    layer: ObservedLayer
    scores: Tensor  # (E,) saliency
    retained: Tensor  # (N,) ascending
    map_experts: Map = map  # for work that goes expert by expert: several processes share it
    protected: tuple[int, ...] = ()  # experts that must be among the retained ones


@dataclass(frozen=True)
class Candidate:
    """One proposal for the layer."""

    segments: Segments  # N experts
    router_rows: Tensor | None = None  # (N, d); None: the retained experts' own rows
    facts: Mapping[str, object] = field(default_factory=dict)  # for the report, JSON-able
    retained: Tensor | None = None  # (N,) ascending, where not the problem's: whose router tensors the N experts get


class Method(Protocol):
    """A compression method.

    Attributes that it may have: `needs_tokens = False` where statistics and weights are enough for it,
    `needs_router_logits = True` where it cannot do without a router matrix that reads what the experts read.
    """

    def compress_layer(self, problem: LayerProblem, config: DernConfig) -> dict[str, Candidate]:
        """Candidates by name, the method's own result last; the guard chooses among them, or the last is taken."""


METHODS: dict[str, Method] = {}


def register_method(name: str) -> Callable[[type], type]:
    """Class decorator: make a method available as `DernConfig(method=name)`."""

    def register(cls: type) -> type:
        METHODS[name] = cls()
        return cls

    return register


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose one of {', '.join(sorted(METHODS))}")
    return METHODS[name]
