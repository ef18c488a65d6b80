"""Compression methods behind one interface; importing this package registers them."""

from . import dern, prune
from .registry import METHODS, Candidate, LayerProblem, Method, get_method, register_method


__all__ = ["METHODS", "Candidate", "LayerProblem", "Method", "dern", "get_method", "prune", "register_method"]
