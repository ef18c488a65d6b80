"""Expert counts that differ from layer to layer, where a model's own code can hold them.

Configs of transformers 5 may override values layer by layer (`config.per_layer_config`), but most families read their
expert count from the config as a whole.  Which ones read it per layer is no list here: the model's class is asked, by
building it without weights.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .structure import COUNT_KEYS, MoELayer, find_moe_layers, layers_by_position


__all__ = ["check_layer_counts", "write_layer_counts_"]


def check_layer_counts(model: nn.Module, layers: list[MoELayer]) -> None:
    """Refuse a model whose layers must all have the same number of experts.

    Args:
        model: of transformers; its weights need not be there.
        layers: its MoE layers.

    Raises:
        ValueError: naming the family and what to give instead.
    """
    positions = layers_by_position(model, layers)
    last = max(positions)
    counts = {at: layer.num_experts - layer.num_groups * (at == last) for at, layer in positions.items()}
    reason = _why_not(model, counts)
    if reason is not None:
        raise ValueError(
            f"layer_budget='error' gives layers different numbers of experts, but a plain checkpoint of "
            f"{model.config.get_text_config().model_type} has one count for all layers ({reason}); "
            "give layer_budget='uniform'"
        )


def write_layer_counts_(model: nn.Module, layers: list[MoELayer], counts: Mapping[int, int]) -> None:
    """Write every layer's expert count into the model's config.

    Args:
        model: whose layers have all been written.
        layers: as found before compression.
        counts: by the position of the decoder layer.
    """
    for at, layer in layers_by_position(model, layers).items():
        if layer.config is not model.config.get_text_config():  # the layer's own copy
            for key in _count_keys(layer.config, layer.num_experts):
                setattr(layer.config, key, counts[at])
    _override_counts_(model.config.get_text_config(), layers[0].num_experts, counts)


def _why_not(model: nn.Module, counts: Mapping[int, int]) -> str | None:
    """What keeps a model of this class from having such counts; None where nothing does."""
    config = copy.deepcopy(model.config)
    _override_counts_(config.get_text_config(), max(counts.values()), counts)
    try:
        with torch.device("meta"):
            built = type(model)._from_config(config)
    except Exception as error:  # whatever a family's code raises where it wants a single number
        return f"{type(error).__name__} while it is built"
    found = {at: layer.num_experts for at, layer in layers_by_position(built, find_moe_layers(built)).items()}
    return None if found == counts else "its code does not read per_layer_config for them"


def _override_counts_(config: Any, before: int, counts: Mapping[int, int]) -> None:
    stored = {int(at): dict(values) for at, values in (config.to_dict().get("per_layer_config") or {}).items()}
    keys = _count_keys(config, before)
    config.per_layer_config = {
        at: stored.get(at, {}) | (dict.fromkeys(keys, counts[at]) if at in counts else {})
        for at in range(config.num_hidden_layers)
        if at in counts or at in stored
    }


def _count_keys(config: Any, count: int) -> list[str]:
    """The keys under which a config stores this expert count."""
    stored = config.to_dict()
    return [key for key in COUNT_KEYS if stored.get(key) == count]
