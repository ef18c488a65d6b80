"""How long a sequence a model is made for, as far as its config tells."""

from typing import Any


__all__ = ["bounded_length", "context_length"]

# Families' names for it, the first three in lm-eval's order.  A sliding window is none: it limits what one layer sees.
KEYS = (
    "n_positions",
    "max_position_embeddings",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_length",
    "context_length",
    "model_max_length",
)


def context_length(config: Any) -> int | None:
    """The longest sequence that a model is made for; None where its config says nothing.

    Args:
        config: of transformers; of one with parts the text model's counts, and then its own.
    """
    for part in (config.get_text_config(), config):
        for key in KEYS:
            value = getattr(part, key, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def bounded_length(config: Any, length: int) -> int:
    """A length of sequences, or what the model is made for where that is less."""
    return min(length, context_length(config) or length)
