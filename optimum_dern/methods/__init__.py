"""Compression methods behind one interface; importing this package registers them."""

from . import cd_moe, dern, merging, mone, narrow, prune
from .registry import METHODS, Candidate, LayerProblem, Method, get_method, register_method


__all__ = [
    "METHODS",
    "Candidate",
    "LayerProblem",
    "Method",
    "cd_moe",
    "dern",
    "get_method",
    "merging",
    "mone",
    "narrow",
    "prune",
    "register_method",
]
