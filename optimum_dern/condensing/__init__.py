"""Condensing: some MoE layers of a model become dense ones, of their shared and a few of their routed experts."""

from .condense import condense_layers


__all__ = ["condense_layers"]
