"""The pass through the decoder: hidden states go from layer to layer, and every MoE layer is compressed on the way."""
