"""Which layers of a model may become dense, and the empty networks that take their places; refused before any work."""

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

from torch import nn

from ..models.moe.structure import MoELayer, find_moe_layers, layers_by_position
from ..models.size import measure_model
from ..results.report import ModelSize
from .dense_form import dense_form, possible_layers, which_dense
from .dense_network import check_condensable, dense_width, shared_experts


__all__ = ["CondensingPlan", "condensed_copy", "condensed_size", "make_dense_", "plan_condensing"]


@dataclass(frozen=True)
class CondensingPlan:
    """The layers that may become dense, with the networks that take their places."""

    at: Mapping[int, MoELayer]  # all MoE layers, by the index of their decoder layer
    networks: Mapping[int, nn.Module]  # on the meta device until they are filled, by position
    sizes: Mapping[str, int]  # config values that give the networks their width, where it is not dense layers' already
    num_experts: int  # routed experts in each of them
    num_layers: int  # that become dense
    searched: bool  # whether a search chooses them; else they are those of the networks


def plan_condensing(
    model: nn.Module, layers: Sequence[MoELayer], which: int | Sequence[int], num_experts: int | None = None
) -> CondensingPlan:
    """Plan which layers become dense, or refuse that.

    Args:
        model: its weights need not be loaded.
        layers: its MoE layers.
        which: positions of decoder layers, or how many layers are to be searched.
        num_experts: routed experts in each dense layer, 0 for the shared ones alone; by default as many as a token
            uses.

    Raises:
        ValueError: a model whose layers cannot be dense ones, or numbers out of range.
    """
    at = layers_by_position(model, list(layers))
    count = at[min(at)].top_k if num_experts is None else num_experts
    _check_experts(at[min(at)], count)
    searched = isinstance(which, int)
    positions = _searchable(at, which) if searched else _given(at, which)
    settings, networks = dense_form(model, at, positions, dense_width(at[min(at)], count))
    for position, network in networks.items():
        check_condensable(at[position], network)
    kinds = which_dense(at[min(at)].config, positions)
    sizes = {key: value for key, value in settings.items() if key not in kinds}
    return CondensingPlan(at, networks, sizes, count, which if searched else len(networks), searched)


def make_dense_(model: nn.Module, plan: CondensingPlan, positions: Collection[int]) -> None:
    """Put dense networks in the place of MoE blocks, and say so in the config.

    Args:
        model: that the plan is of.
        plan: with the networks.
        positions: layers that become dense.
    """
    config = plan.at[min(plan.at)].config
    for key, value in {**which_dense(config, positions), **plan.sizes}.items():
        setattr(config, key, value)
    for position in positions:
        model.set_submodule(plan.at[position].name, plan.networks[position])


def condensed_copy(model: nn.Module, plan: CondensingPlan, positions: Collection[int]) -> nn.Module:
    """Copy a model without weights, with some of its layers dense.

    Args:
        model: on the meta device.
        plan: of it.
        positions: layers that are dense in the copy.
    """
    model, networks = deepcopy(model), deepcopy(plan.networks)
    at = layers_by_position(model, find_moe_layers(model))
    make_dense_(model, replace(plan, at=at, networks=networks), positions)
    return model


def condensed_size(
    model: nn.Module, layers: Sequence[MoELayer], which: int | Sequence[int], num_experts: int | None = None
) -> ModelSize:
    """Predict the size of a model with dense layers, which is the same whichever layers a search finds.

    Args:
        model: on the meta device.
        layers: its MoE layers.
        which: as in `plan_condensing`.
        num_experts: as in `plan_condensing`.
    """
    plan = plan_condensing(model, layers, which, num_experts)
    copy = condensed_copy(model, plan, [*plan.networks][: plan.num_layers])
    return measure_model(copy, find_moe_layers(copy))


def _check_experts(layer: MoELayer, count: int) -> None:
    """Refuse a number of routed experts that a layer does not have, or none where there are no shared ones."""
    shared = shared_experts(layer)
    least = 0 if shared is not None else 1
    if not least <= count <= layer.num_experts:
        without = "" if shared is not None else ", and no shared ones"
        raise ValueError(
            f"num_experts={count}, but each layer has {layer.num_experts} routed experts{without}; give {least} to "
            f"{layer.num_experts}"
        )


def _searchable(at: Mapping[int, MoELayer], count: int) -> list[int]:
    """Return the layers of which a search may choose some."""
    if not 1 <= count <= len(at):
        raise ValueError(
            f"{count} layers are to become dense, but the model has {len(at)} MoE layers; give 1 to {len(at)}"
        )
    positions = _possible(at)
    while len(positions) < count:  # only one can be next: dense layers come first
        positions += possible_layers(at, positions)
    return positions


def _given(at: Mapping[int, MoELayer], which: Sequence[int]) -> list[int]:
    """Return the layers that are to become dense, if they can."""
    positions = sorted({*which})
    if wrong := [position for position in positions if position not in at]:
        raise ValueError(
            f"layer {wrong[0]} is to become dense, but the MoE layers are {sorted(at)}; give some of these"
        )
    if not positions:
        raise ValueError("no layer is to become dense; give at least one")
    possible = _possible(at)
    if which_dense(at[min(at)].config, positions) is None:
        raise ValueError(
            f"a config of {at[min(at)].config.model_type} only says how many dense layers come first, so that layers "
            f"{positions} cannot become dense alone; give all from {possible[0]} on"
        )
    return positions


def _possible(at: Mapping[int, MoELayer]) -> list[int]:
    """Return the layers of which one may be the first, and refuse a family that has no dense layers."""
    first = at[min(at)]
    if possible := possible_layers(at):
        return possible
    raise ValueError(
        f"a config of {first.config.model_type} cannot say that a layer is dense, so that no plain checkpoint holds "
        f"condensed ones; method='cd_moe' with num_experts={first.top_k} keeps their form and condenses all"
    )
