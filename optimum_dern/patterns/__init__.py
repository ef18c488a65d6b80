"""Load only the experts that a task needs, from a library of tasks' patterns (PreMoe, arXiv 2505.17639)."""

from .build import build_patterns
from .library import PatternLibrary
from .load import load_for


__all__ = ["PatternLibrary", "build_patterns", "load_for"]
