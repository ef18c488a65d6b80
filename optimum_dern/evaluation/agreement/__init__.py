"""Agreement of a compressed model with the original, whose predictions are cached on disk."""
