"""The method registry: a method turns one layer's weights and statistics into candidates for the compressed layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from ..core.dern.recombination import Map
from ..core.layer.cost import Cost, LayerShape
from ..core.layer.observation import ObservedLayer
from ..core.layer.segments import Segments


if TYPE_CHECKING:
    from ..config import DernConfig


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
    """A compression method; all but `compress_layer` may be left out."""

    needs_tokens: bool  # False where statistics and weights are enough for it
    needs_router_logits: bool  # True where it cannot do without a router matrix that reads what the experts read
    defaults: Mapping[str, object]  # what its paper fixes of the config, where the user does not
    options: (
        Sequence[str] | None
    )  # fields of the config that only it reads, refused beside others; None: it may read any

    def compress_layer(self, problem: LayerProblem, config: "DernConfig") -> dict[str, Candidate]:
        """Candidates by name, the method's own result last; the guard chooses among them, or the last is taken."""

    def candidates(self, config: "DernConfig") -> tuple[int, int]:
        """How many there are, and of how many different sets of retained experts, at most."""

    def costs(self, shape: LayerShape, config: "DernConfig") -> list[Cost]:
        """What its steps take, in turn, up to the moment when plain copies of the retained experts are made."""


OPTIONAL = {
    "needs_tokens": True,
    "needs_router_logits": False,
    "defaults": {},
    "options": None,
    "candidates": lambda self, config: (2, 2),  # its own result, of experts of its own, beside plain pruning
    "costs": lambda self, shape, config: [],
}
METHODS: dict[str, Method] = {}


def register_method(name: str) -> Callable[[type], type]:
    """Class decorator: make a method available as `DernConfig(method=name)`."""

    def register(cls: type) -> type:
        for attribute, value in OPTIONAL.items():
            if not hasattr(cls, attribute):
                setattr(cls, attribute, value)
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
