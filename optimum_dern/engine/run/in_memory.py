"""Compress a model that is completely in memory, in place."""

from typing import Any

from ...config import DernConfig
from ...machine.torch_state import evaluation_mode
from ...models.moe.original import restored_on_error
from ...models.moe.structure import MoELayer
from ...models.moe.view import write_counts_
from ...models.width import write_width_
from ...results.report import LayerReport
from ..layer.narrowing import written_width
from ..walk.decoder import compress_layers_, compress_unseen_layers_
from ..walk.recipe import Recipe


__all__ = ["compress_in_memory_"]


def compress_in_memory_(
    model: Any, layers: list[MoELayer], batches: list[dict], config: DernConfig, num_experts: int
) -> list[LayerReport]:
    """Compress a model that has passed the checks, in place; on an error or interrupt it is restored.

    Args:
        model: a causal language model.
        layers: its MoE layers.
        batches: calibration batches; empty where no tokens are needed.
        config: of the compression.
        num_experts: N, experts that each layer keeps.

    Returns:
        One report per MoE layer.
    """
    with evaluation_mode(model), restored_on_error(layers):
        recipes = [Recipe(config, num_experts)]
        if batches:
            (reports,) = compress_layers_(model, layers, batches, recipes)
        else:
            (reports,) = compress_unseen_layers_(model, layers, recipes)
    write_width_(model, layers, written_width(layers[0], config))
    write_counts_(model, layers, num_experts)
    return reports
