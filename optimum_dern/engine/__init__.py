"""The engine: runs calibration tokens through the model and compresses its MoE layers, one decoder layer at a time."""
