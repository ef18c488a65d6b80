"""Size of the attention scores that a model holds in memory, read from its config."""

from typing import Any


__all__ = ["attention_scores"]


def attention_scores(config: Any, length: int) -> int:
    """Return how many attention scores a layer holds at once for each token of a sequence.

    Args:
        config: of transformers, after the model was made, which chooses the implementation of its attention.
        length: tokens of the sequence.

    Returns:
        One for each head and token of the sequence with eager attention; 0 with others, which never hold them all.
    """
    if getattr(config, "_attn_implementation", None) != "eager":
        return 0
    return getattr(config.get_text_config(), "num_attention_heads", 1) * length
