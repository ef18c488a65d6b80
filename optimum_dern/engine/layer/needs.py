"""What a config needs: the calibration tokens themselves, statistics of them, or neither."""

from ...config import DernConfig
from ...core.criteria.registry import CRITERIA, NEEDS
from ...methods import get_method


__all__ = ["selection_needs", "why_tokens"]


def selection_needs(config: DernConfig) -> str:
    """Return what the selection of experts needs, one of `core.criteria.registry.NEEDS`."""
    protection = "statistics" if config.protect_experts == "super" else "nothing"
    return max(CRITERIA[config.selection].needs, protection, key=NEEDS.index)


def why_tokens(config: DernConfig) -> str | None:
    """Return why a config needs the calibration tokens themselves; None where statistics or weights are enough."""
    if config.guard:
        return "guard judges candidates on held-out tokens"
    if config.refit:
        return "refit fits experts to tokens"
    if config.importance is not None:
        return f"importance={config.importance!r} works on tokens"
    if getattr(get_method(config.method), "needs_tokens", True):
        return f"method={config.method!r} works on tokens"
    if selection_needs(config) in ("tokens", "residual"):
        return f"selection={config.selection!r} works on tokens"
    return None
