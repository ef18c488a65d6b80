"""What a compression did: a machine-readable report and a model card."""
