"""Compression methods behind one interface; importing this package registers them."""

from . import dern, hc_smoe, m_smoe, mergemoe, narrow, prune, ream, sub_moe
from .registry import METHODS, Candidate, LayerProblem, Method, get_method, register_method


__all__ = [
    "METHODS",
    "Candidate",
    "LayerProblem",
    "Method",
    "dern",
    "get_method",
    "hc_smoe",
    "m_smoe",
    "mergemoe",
    "narrow",
    "prune",
    "ream",
    "register_method",
    "sub_moe",
]
