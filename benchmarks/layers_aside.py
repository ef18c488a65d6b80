"""Sink that keeps compressed layers in memory beside an unchanged model, to evaluate several results of one pass."""

import torch
from torch import nn

from optimum_dern.engine.walk.recipe import InPlace
from optimum_dern.models.moe.structure import MoELayer, layers_by_position
from optimum_dern.models.moe.view import LayerWeights, read_layer, write_counts_, write_layer_
from optimum_dern.models.width import write_width_
from optimum_dern.results.report import LayerReport


class LayersAside(InPlace):
    """Sink that copies the compressed layers of one recipe, while the model itself is restored.

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
        """Keep the weights of a compressed layer."""
        super().finish(position, report)
        if report is not None:
            self.weights[report.name] = read_layer(self.positions[position])

    @torch.no_grad()
    def write_(self, model: nn.Module, layers: list[MoELayer]) -> None:
        """Write the compressed layers into the original model or a copy, and their sizes into its config.

        Args:
            model: the original, or a copy of it.
            layers: its own MoE layers.
        """
        for layer in layers:
            write_layer_(layer, self.weights[layer.name])
        first = next(iter(self.weights.values()))
        write_width_(model, layers, first.segments.up.shape[1])
        write_counts_(model, layers, first.num_experts)
