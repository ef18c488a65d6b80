"""Compressed layers kept beside a model that stays as it is, to try several results of one pass in it later."""

import torch
from torch import nn

from optimum_dern.engine.walk.recipe import InPlace
from optimum_dern.models.moe.structure import MoELayer, layers_by_position
from optimum_dern.models.moe.view import LayerWeights, read_layer, write_counts_, write_layer_
from optimum_dern.results.report import LayerReport


class LayersAside(InPlace):
    """A sink of one recipe.

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
