"""The mathematics of expert selection, merging and refits: pure functions on tensors, without transformers."""
