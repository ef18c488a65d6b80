"""Merge fine-tuned checkpoints of one base model into one, by fixed rules or by coefficients learned on text."""

from .learned import LearnedSettings, learn_coefficients
from .merge import merge_checkpoints


__all__ = ["LearnedSettings", "learn_coefficients", "merge_checkpoints"]
