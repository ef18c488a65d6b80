"""`config.json` of a compressed checkpoint: the source's file with only the changed values replaced.

transformers 5 rewrites a config when it saves it (`rope_theta` moves into `rope_parameters`, `num_experts` of
Qwen3-MoE becomes `num_local_experts`), and older readers then silently use defaults.  So the source's JSON is kept key
by key, and the differences between the config as loaded and the config now are applied to it.  The rotary embedding is
also written as transformers 4 and mlx-lm read it: `rope_theta`, `rope_scaling` and `partial_rotary_factor` at the top.
"""

import json
from collections.abc import Mapping
from typing import Any

from ...results.public_names import public_source


__all__ = ["complete_rope", "compressed_config"]

# Names that readers use for the same key.
ALIASES = ({"num_experts", "num_local_experts"}, {"dtype", "torch_dtype"})
IGNORED = {"transformers_version", "architectures", "quantization_config", "model_type"}
SOURCE_KEYS = ("quantization_config", "transformers_weights")  # about the source's files, not the output's
MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")  # these layers are not in the saved model
ROPE_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
OF_TRANSFORMERS_4 = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")  # its rope types


def compressed_config(saved: Mapping[str, Any], source: Mapping[str, Any] | None, config: Any) -> dict[str, Any]:
    """Make the config.json of a compressed checkpoint.

    Args:
        saved: the JSON that transformers would write for the compressed model.
        source: the source checkpoint's JSON, if there is one.
        config: the compressed model's config object.

    Returns:
        The source's JSON with the differences applied, expert counts under every alias, the rotary embedding also in
        the form of transformers 4, no quantisation, no MTP layers and no name of a weight file; without a source of
        the same type, the saved JSON, completed in the same way.
    """
    if source is None or source.get("model_type") != config.model_type:
        result = json.loads(json.dumps(saved))
    else:
        result = json.loads(json.dumps(source))
        loaded = _config_from_json(type(config), source).to_dict()
        _apply_changes(result, loaded, config.to_dict())
    _complete_aliases(result, config)
    complete_rope(result, config)
    _name_without_folders(result)
    for key in SOURCE_KEYS:
        result.pop(key, None)
    for key in MTP_KEYS:
        if result.get(key):
            result[key] = 0
    return result


def _apply_changes(target: dict[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Write into `target` every value that differs between two config dicts, under the names that it already uses."""
    for key, value in after.items():
        old = before.get(key)
        if key.startswith("_") or key in IGNORED or value == old:
            continue
        aliases = next((names for names in ALIASES if key in names), {key})
        if key == "rope_parameters":  # older files have its parts under names of their own
            for name in ROPE_KEYS - after.keys():
                target.pop(name, None)
            target[key] = value
        elif isinstance(value, Mapping) and isinstance(old, Mapping):
            if isinstance(target.get(key), dict):
                _apply_changes(target[key], old, value)
        else:
            target.update(dict.fromkeys(aliases & target.keys() or {key}, value))


def _complete_aliases(target: dict[str, Any], config: Any) -> None:
    """Write the expert count of Qwen3-MoE as `num_experts` (transformers 4) and `num_local_experts` (5)."""
    if config.attribute_map.get("num_experts") == "num_local_experts":
        target["num_experts"] = target["num_local_experts"] = config.num_local_experts
    for key, value in target.items():
        if isinstance(value, dict) and hasattr(getattr(config, key, None), "attribute_map"):
            _complete_aliases(value, getattr(config, key))


def _name_without_folders(target: dict[str, Any]) -> None:
    """Remove local folders from `_name_or_path`, where older releases of transformers stored them."""
    for key, value in target.items():
        if isinstance(value, dict):
            _name_without_folders(value)
        elif key in ("_name_or_path", "name_or_path") and isinstance(value, str):
            target[key] = public_source(value)


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
    now, then = (_config_from_json(type(config), values) for values in (target, target | older))
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


def _config_from_json(config_class: type, values: Mapping[str, Any]) -> Any:
    """Build a config object from its JSON, which is not modified, unlike by `from_dict`."""
    return config_class.from_dict(_with_floats(values))


def _with_floats(value: Any) -> Any:
    """Convert infinities in JSON values to numbers: transformers writes them as {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        number = value.get("__float__")
        return {k: _with_floats(v) for k, v in value.items()} if number is None else float(number)
    return [_with_floats(v) for v in value] if isinstance(value, list) else value
