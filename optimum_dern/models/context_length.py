"""Maximum sequence length of a model, read from its config."""

from typing import Any


__all__ = ["bounded_length", "context_length"]

# Config keys of the model families, the first three in lm-eval's order; a sliding window limits only single layers.
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
    """Return the maximum sequence length of a model, or None if its config has none.

    Args:
        config: of transformers; in a multimodal config, the text model's part takes precedence.
    """
    for part in (config.get_text_config(), config):
        for key in KEYS:
            value = getattr(part, key, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def bounded_length(config: Any, length: int) -> int:
    """Limit a sequence length to the maximum of the model."""
    return min(length, context_length(config) or length)
