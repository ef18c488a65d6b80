"""`Recipe`: config and expert count of one result of a pass over a model, and the sink of its compressed layers."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from ...config import DernConfig
from ...results.report import LayerReport


__all__ = ["InPlace", "LayerSink", "Recipe", "keep_originals"]


class LayerSink(Protocol):
    """Destination of the compressed layers of one recipe: the model itself, memory, or a checkpoint."""

    finished: Mapping[int, LayerReport | None]  # by position, layers that this or an earlier run has finished
    in_place: bool  # whether the compressed layers may stay in the model

    def loaded(self, position: int) -> AbstractContextManager:
        """Load a compressed layer that an earlier run has finished into the model while the context is open."""

    def finish(self, position: int, report: LayerReport | None) -> None:
        """Take over a finished layer, which is in the model; layers without experts have no report."""


class InPlace:
    """Sink that leaves the compressed layers in the model."""

    in_place = True

    def __init__(self) -> None:
        self.finished: dict[int, LayerReport | None] = {}

    def loaded(self, position: int) -> AbstractContextManager:
        """Do nothing: the compressed layer is in the model."""
        return nullcontext()

    def finish(self, position: int, report: LayerReport | None) -> None:
        """Note that the layer is finished; it stays in the model."""
        self.finished[position] = report


@dataclass(frozen=True, eq=False)
class Recipe:
    """Config, expert count and sink of one of the results of a pass over a model."""

    config: DernConfig
    num_experts: int  # N, experts that every layer keeps
    sink: LayerSink = field(default_factory=InPlace)

    @property
    def reports(self) -> list[LayerReport]:
        """Reports of the finished MoE layers, in the order of the decoder."""
        return [report for _, report in sorted(self.sink.finished.items()) if report is not None]


def keep_originals(recipes: Sequence[Recipe]) -> bool:
    """Whether every layer must be restored after its compression, for the next recipe or because a sink demands it."""
    return len(recipes) > 1 or not all(recipe.sink.in_place for recipe in recipes)
