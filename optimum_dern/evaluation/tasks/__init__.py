"""Tasks scored by likelihood."""
