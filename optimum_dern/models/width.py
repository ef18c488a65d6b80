"""The width of a model's experts in its config: found by building the model, so that nothing else changes with it.

The same key may size other modules: DeepSeek's `moe_intermediate_size` also sizes its shared experts, by their number,
and Jamba's `intermediate_size` its dense layers.  So a model is built without weights from a changed config, and a
change counts only if nothing but the routed experts has another shape.  Where the shared experts have, a number of
them that keeps their shape is changed, too.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from torch import nn

from ..core.neurons.selection import retained_width
from .moe.sizes import expert_shapes
from .moe.structure import MoELayer
from .skeleton import build_like


__all__ = ["resolve_width", "width_settings", "write_width_"]


def resolve_width(layer: MoELayer, width: int | None, sparsity: float | None, multiple_of: int = 1) -> int:
    """Compute how many neurons every expert keeps.

    Args:
        layer: any MoE layer of the model.
        width: the number asked for, or None.
        sparsity: fraction dropped, where `width` is None; None for neither.
        multiple_of: round up to a multiple of this.

    Raises:
        ValueError: more neurons than there are, or a number that kernels cannot read.
    """
    if width is None and sparsity is None:
        return layer.width
    aligned = _alignment(layer)
    if width is None:
        return retained_width(layer.width, sparsity, math.lcm(multiple_of, aligned))
    if width > layer.width:
        raise ValueError(f"width={width}, but experts have {layer.width} neurons; choose width=1 to {layer.width - 1}")
    if width % aligned:
        raise ValueError(
            f"width={width}, but torch's grouped matrix products read rows of 16 bytes; choose a multiple of {aligned}"
        )
    return width


def _alignment(layer: MoELayer) -> int:
    """Return the number of neurons in 16 bytes, where the rows of the experts as they are consist of such blocks."""
    itemsize = layer.experts.down_proj.element_size()
    return 16 // itemsize if layer.width * itemsize % 16 == 0 else 1


def width_settings(model: nn.Module, layers: Sequence[MoELayer], width: int) -> dict[str, Any]:
    """Find the config values that give a model's experts another width, and change no other tensor.

    Args:
        model: its weights need not be loaded.
        layers: its MoE layers, as found before compression.
        width: neurons of an expert.

    Returns:
        Values by key of `layers[0].config`; none where the width stays.

    Raises:
        ValueError: there are none; the message says what else would change, and which widths are possible.
    """
    before = layers[0].width
    if width == before:
        return {}
    goal = _shapes(build_like(model, deepcopy(model.config))) | {  # the model may be compressed already
        f"{layer.experts_name}.{name}": shape
        for one in layers
        for layer in (one, *one.twins)
        for name, shape in expert_shapes(layer, layer.num_experts, width).items()
    }
    config, others = layers[0].config, {}
    for key, value in _keys_of(config, before):
        for settings in _tries(config, key, value, before, width):
            wrong = _differences(model, config, settings, goal)
            if not wrong:
                return settings
            if not any(name.startswith(f"{layers[0].experts_name}.") for name in wrong):
                others.setdefault(key, wrong[0])  # it has the experts' width, and that of something else
    raise ValueError(_refusal(layers[0], others, width))


def write_width_(model: nn.Module, layers: Sequence[MoELayer], width: int) -> None:
    """Set the width of the experts in the model's config."""
    for key, value in width_settings(model, layers, width).items():
        setattr(layers[0].config, key, value)


def _keys_of(config: Any, size: int) -> list[tuple[str, Any]]:
    """List the config's keys that hold a size, or a list that repeats it; those named after experts first."""
    found = [(key, value) for key, value in config.to_dict().items() if _holds(value, size)]
    return sorted(found, key=lambda entry: not ("moe" in entry[0] or "expert" in entry[0]))


def _holds(value: object, size: int) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return len(values) > 0 and all(isinstance(v, int) and not isinstance(v, bool) and v == size for v in values)


def _tries(config: Any, key: str, value: Any, before: int, width: int) -> Iterator[dict[str, Any]]:
    """Yield the width alone, then with a number of shared experts that leaves these as wide as they are."""
    changed = {key: [width] * len(value) if isinstance(value, list | tuple) else width}
    yield changed
    for name, count in _shared_counts(config):
        if count * before % width == 0:
            yield changed | {name: count * before // width}


def _shared_counts(config: Any) -> list[tuple[str, int]]:
    """List the config's numbers of shared experts."""
    values = config.to_dict().items()
    return [(n, v) for n, v in values if "shared" in n and isinstance(v, int) and not isinstance(v, bool) and v > 0]


def _differences(
    model: nn.Module, config: Any, settings: Mapping[str, Any], goal: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """List the parameters whose shapes are not the goal's with changed settings; none if all are."""
    whole, part = deepcopy((model.config, config))  # together, so that one stays inside the other
    for key, value in settings.items():
        setattr(part, key, value)
    try:
        found = _shapes(build_like(model, whole))
    except (RuntimeError, TypeError, ValueError) as error:  # the class refuses such a config
        return [f"({error})"]
    return [name for name in goal | found if goal.get(name) != found.get(name)]


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _refusal(layer: MoELayer, others: Mapping[str, str], width: int) -> str:
    what = f"experts of {layer.width} neurons cannot have {width} in a plain checkpoint of this model"
    if not others:
        return f"{what}: no key of its config says how many they have; drop whole experts instead (num_experts)"
    key, name = next(iter(others.items()))
    shared = [count for _, count in _shared_counts(layer.config)]
    advice = "drop whole experts instead (num_experts)"
    if "shared" in name and shared and shared[0] * layer.width % width:
        together = shared[0] * layer.width  # neurons of the shared experts
        advice = f"choose a width that divides {together}, so that the shared experts stay as wide as they are"
    return f"{what}: {key} also sizes others, such as {name}; {advice}"
