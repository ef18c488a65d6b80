"""From a config's JSON to its object, as transformers reads it from a file."""

from collections.abc import Mapping
from typing import Any


__all__ = ["config_from_json"]


def config_from_json(config_class: type, values: Mapping[str, Any]) -> Any:
    """The config object of a JSON.

    Args:
        config_class: of transformers.
        values: the JSON, in which infinities may stand as transformers writes them; it stays as it is, which
            `from_dict` itself does not promise.
    """
    return config_class.from_dict(_with_floats(values))


def _with_floats(value: Any) -> Any:
    """JSON values with infinities as numbers: transformers writes them as {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        number = value.get("__float__")
        return {k: _with_floats(v) for k, v in value.items()} if number is None else float(number)
    return [_with_floats(v) for v in value] if isinstance(value, list) else value
