"""MoE layers inside transformers models: found by their shape, read, and rewritten."""
