"""What one pass over a model is to give, and where it goes: several results may share the pass."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from ..config import DernConfig
from ..models.structure import MoELayer, layers_by_position
from ..models.view import LayerWeights, read_layer, write_counts_, write_layer_
from ..reporting.report import LayerReport


__all__ = ["InPlace", "LayerSink", "LayersAside", "Target", "keep_originals"]


class LayerSink(Protocol):
    """Where the compressed layers of one result go."""

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
class Target:
    """One result of a pass."""

    config: DernConfig
    num_experts: int  # N, that every layer keeps
    sink: LayerSink = field(default_factory=InPlace)
    layer_counts: Mapping[int, int] | None = None  # by position, where layers keep different numbers

    def count(self, position: int) -> int:
        """How many experts a layer keeps."""
        return self.num_experts if self.layer_counts is None else self.layer_counts[position]


def keep_originals(targets: Sequence[Target]) -> bool:
    """Whether every layer has to be put back as it was: for the next target, or because a sink says so."""
    return len(targets) > 1 or not all(target.sink.in_place for target in targets)


class LayersAside(InPlace):
    """Keeps compressed layers beside a model that stays as it is, to try them in it later.

    Args:
        model: in memory.
        layers: its MoE layers.
    """

    in_place = False

    def __init__(self, model: nn.Module, layers: list[MoELayer]) -> None:
        super().__init__()
        self.positions = layers_by_position(model, layers)
        self.weights: dict[str, LayerWeights] = {}  # by the name of the layer

    def finish(self, position: int, report: LayerReport | None) -> None:
        """Keep what the layer has become."""
        super().finish(position, report)
        if report is not None:
            self.weights[report.name] = read_layer(self.positions[position])

    @torch.no_grad()
    def write_(self, model: nn.Module, layers: list[MoELayer]) -> None:
        """Turn a model like the original into this result, counts in its config included.

        Args:
            model: the original, or a copy of it.
            layers: its own MoE layers.
        """
        for layer in layers:
            write_layer_(layer, self.weights[layer.name])
        write_counts_(model, layers, next(iter(self.weights.values())).num_experts)
