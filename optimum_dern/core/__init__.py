"""The mathematics of DERN as pure functions on tensors: no transformers, no modules, no files."""
