"""Condensing: some MoE layers of a model become dense ones, of their shared and a few of their routed experts."""

from .condense import CondensedLayer, condense_layers


__all__ = ["CondensedLayer", "condense_layers"]
