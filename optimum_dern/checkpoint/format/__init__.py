"""The file format of a checkpoint: safetensors shards, quantised or not, with transformers' tensor names."""
