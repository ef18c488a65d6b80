"""Options of a compression: fields, presets, and what is refused."""

from .fields import CHOICES, GROUPS, DernOptions, without_retired
from .presets import PRESETS


__all__ = ["CHOICES", "GROUPS", "PRESETS", "DernOptions", "without_retired"]
