"""Dense layers in the config of a MoE model: which layers can be dense, and how wide their feed-forward networks are.

Families say in three ways which of their layers are dense: a type for every layer, a list of the dense ones, or how
many there are before the first with experts.  Like a width (`models.width`), a change counts only if a model built
from it has the same tensors outside the layers in question.
"""

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

from torch import nn

from ..models.moe.structure import MoELayer
from ..models.skeleton import build_like


__all__ = ["PROJECTIONS", "dense_form", "possible_layers", "which_dense"]

NUMBERS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")  # of dense layers, which come first
PROJECTIONS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def possible_layers(layers: Mapping[int, MoELayer], dense: Collection[int] = ()) -> list[int]:
    """List the MoE layers that can become dense, one of them next.

    Args:
        layers: MoE layers by the index of their decoder layer.
        dense: those that are to be dense already.

    Returns:
        Positions, ascending; none where the config cannot describe a dense layer.
    """
    config = next(iter(layers.values())).config
    return [p for p in sorted(layers) if p not in dense and which_dense(config, {*dense, p}) is not None]


def which_dense(config: Any, positions: Collection[int]) -> dict[str, Any] | None:
    """Return the config values by which more layers are dense; None where the config cannot describe them."""
    if types := getattr(config, "mlp_layer_types", None):
        return {"mlp_layer_types": ["dense" if p in positions else kind for p, kind in enumerate(types)]}
    if (listed := getattr(config, "mlp_only_layers", None)) is not None:
        return {"mlp_only_layers": sorted({*listed, *positions})}
    for key in NUMBERS:
        first = getattr(config, key, None)
        if isinstance(first, int):
            after = first + len(positions)
            return {key: after} if {*positions} == {*range(first, after)} else None
    return None


def dense_form(
    model: nn.Module, layers: Mapping[int, MoELayer], positions: Collection[int], width: int
) -> tuple[dict[str, Any], dict[int, nn.Module]]:
    """Find the config values by which layers are dense, with feed-forward networks of at least some width.

    Args:
        model: its weights need not be loaded.
        layers: its MoE layers by position.
        positions: those that are to be dense, as `possible_layers` allows.
        width: neurons that they need.

    Returns:
        Values by key of the layers' config, and by position the network, on the meta device, that takes the place of
        the MoE block.  It has more neurons than needed where the config's width also sizes other layers.

    Raises:
        ValueError: no config describes such layers; the message says what is in the way.
    """
    config, kinds = layers[min(layers)].config, which_dense(layers[min(layers)].config, positions)
    if kinds is None:
        raise ValueError(f"the config of {config.model_type} cannot say that layers {sorted(positions)} are dense")
    before = build_like(model, deepcopy(model.config))  # a built model may be tied otherwise than a loaded one
    reason = ""
    for settings in ({**kinds, "intermediate_size": width}, kinds):
        whole, part = deepcopy((model.config, config))  # together, so that one stays inside the other
        for key, value in settings.items():
            setattr(part, key, value)
        found = build_like(model, whole)
        networks = {p: found.get_submodule(layers[p].name) for p in positions}
        reason = _hindrance(before, found, [layers[p].name for p in positions], networks, width)
        if not reason:
            return settings, networks
    raise ValueError(f"layers {sorted(positions)} cannot become dense ones of {width} neurons: {reason}")


def _hindrance(
    model: nn.Module, found: nn.Module, names: list[str], networks: Mapping[int, nn.Module], width: int
) -> str:
    """Return why a model built from a changed config cannot hold the dense layers; nothing if it can."""
    shapes = [{name: tuple(part.shape) for name, part in network.named_parameters()} for network in networks.values()]
    for own in shapes:
        if sorted(own) != sorted(PROJECTIONS):
            return f"dense layers of this family have {', '.join(own)} instead of gate, up and down projections"
    before, after = _others(model, names), _others(found, names)
    if wrong := [name for name in before | after if before.get(name) != after.get(name)]:
        return f"{wrong[0]} would have another shape"
    if (there := min(own["gate_proj.weight"][0] for own in shapes)) < width:
        return (
            f"other dense layers of this model have {there} neurons, and its config has one width for all; keep fewer "
            "experts"
        )
    return ""


def _others(model: nn.Module, names: list[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters outside some modules."""
    inside = tuple(f"{name}." for name in names)
    return {n: tuple(parameter.shape) for n, parameter in model.named_parameters() if not n.startswith(inside)}
