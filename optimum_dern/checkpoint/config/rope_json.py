"""The rotary embedding in a `config.json`: `rope_parameters` of transformers 5, written in the older form, too.

transformers 4 and mlx-lm read `rope_theta`, `rope_scaling` and `partial_rotary_factor` at the top level, and silently
use defaults where they are missing.  transformers 5 reads both forms.
"""

from collections.abc import Mapping
from typing import Any

from .from_json import config_from_json


__all__ = ["ROPE_KEYS", "complete_rope"]

ROPE_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
OF_TRANSFORMERS_4 = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")  # its rope types


def complete_rope(target: dict[str, Any], config: Any) -> None:
    """Add the transformers 4 fields for `rope_parameters` to a config's JSON and to the configs nested in it.

    Parameters per layer type stay as they are, since no Mixture-of-Experts family of transformers 4 uses them.  So
    does a config that has the older form already, or that `config`'s class would read differently with it.

    Args:
        target: a config's JSON, which is written to.
        config: the config object that it describes.
    """
    for key, value in target.items():
        if isinstance(value, dict) and hasattr(getattr(config, key, None), "to_dict"):
            complete_rope(value, getattr(config, key))
    rope = target.get("rope_parameters")
    if not isinstance(rope, Mapping) or "rope_theta" not in rope or {"rope_theta", "rope_scaling"} & target.keys():
        return
    older = {key: value for key, value in _older_form(rope).items() if key not in target}
    now, then = (config_from_json(type(config), values) for values in (target, target | older))
    if getattr(then, "rope_parameters", None) == getattr(now, "rope_parameters", None):
        target.update(older)


def _older_form(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that transformers 4 reads; none for a rope type that it does not know."""
    scaling = {key: value for key, value in rope.items() if key not in ROPE_KEYS}
    kind = scaling.get("rope_type", "default")
    if kind not in OF_TRANSFORMERS_4:
        return {}
    plain = scaling == {"rope_type": "default"}
    older = {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling}
    if rope.get("partial_rotary_factor") is not None:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    original = "original_max_position_embeddings"
    if kind == "longrope" and original in rope:  # only this type reads it at the top level
        older[original] = rope[original]
    return older
