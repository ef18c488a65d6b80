"""The key-value cache among the arguments and outputs of transformers' models."""

from collections.abc import Mapping
from typing import Any


__all__ = ["CACHES", "cache_of"]

CACHES = ("past_key_values", "cache")  # its names before transformers 5.24 and since


def cache_of(output: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cache that a forward pass has filled, as keyword argument of the next one; empty if there is none."""
    name = next((name for name in reversed(CACHES) if output.get(name) is not None), None)
    return {} if name is None else {name: output[name]}
