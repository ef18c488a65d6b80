"""What a model's attention demands of the sequences that run together, read from the model's config."""

from typing import Any


__all__ = ["attention_scores", "heeds_padding"]


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


def heeds_padding(config: Any) -> bool:
    """Return whether masked padding changes what a model makes of the other tokens.

    Sparse attention chooses the tokens or blocks of tokens to attend to, and padding may take the place of others.

    Args:
        config: of transformers; in a multimodal config, the text model's part counts.
    """
    return getattr(config.get_text_config(), "index_topk", None) is not None
