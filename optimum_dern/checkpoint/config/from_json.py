"""Build a config object from a config's JSON, as transformers does when it reads a file."""

from collections.abc import Mapping
from typing import Any


__all__ = ["config_from_json"]


def config_from_json(config_class: type, values: Mapping[str, Any]) -> Any:
    """Build a config object from its JSON.

    Args:
        config_class: a config class of transformers.
        values: the JSON, with infinities as transformers writes them; it is not modified, unlike by `from_dict`.
    """
    return config_class.from_dict(_with_floats(values))


def _with_floats(value: Any) -> Any:
    """Convert infinities in JSON values to numbers: transformers writes them as {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        number = value.get("__float__")
        return {k: _with_floats(v) for k, v in value.items()} if number is None else float(number)
    return [_with_floats(v) for v in value] if isinstance(value, list) else value
