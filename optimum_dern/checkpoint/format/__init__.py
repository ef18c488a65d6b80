"""The files of a checkpoint: safetensors, quantised or not, under transformers' names."""
