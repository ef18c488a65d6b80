"""A MoE layer as tensors: expert weights, forward pass, calibration statistics, and cost formulas."""
