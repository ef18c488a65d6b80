"""`Recipe`: what a pass over a model makes of every layer, and where the compressed layers go."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from ...config import DernConfig
from ...results.report import LayerReport


__all__ = ["InPlace", "LayerSink", "Recipe", "keep_originals"]


class LayerSink(Protocol):
    """Where the compressed layers of one recipe go."""

    finished: Mapping[int, LayerReport | None]  # layers that this run or an earlier one has done
    in_place: bool  # whether the model may lose its original layers

    def loaded(self, position: int) -> AbstractContextManager:
        """The layer as an earlier run has left it is in memory while the context is open."""

    def finish(self, position: int, report: LayerReport | None) -> None:
        """The compressed layer is in the model, and done; layers without experts have no report."""


class InPlace:
    """Compressed layers stay in the model."""

    in_place = True

    def __init__(self) -> None:
        self.finished: dict[int, LayerReport | None] = {}

    def loaded(self, position: int) -> AbstractContextManager:
        """It is in the model."""
        return nullcontext()

    def finish(self, position: int, report: LayerReport | None) -> None:
        """It is in the model."""
        self.finished[position] = report


@dataclass(frozen=True, eq=False)
class Recipe:
    """One of the results of a pass."""

    config: DernConfig
    num_experts: int  # N, that every layer keeps
    sink: LayerSink = field(default_factory=InPlace)

    @property
    def reports(self) -> list[LayerReport]:
        """Of the MoE layers that are done, in the order of the decoder."""
        return [report for _, report in sorted(self.sink.finished.items()) if report is not None]


def keep_originals(recipes: Sequence[Recipe]) -> bool:
    """Whether every layer has to be put back as it was: for the next recipe, or because a sink says so."""
    return len(recipes) > 1 or not all(recipe.sink.in_place for recipe in recipes)
