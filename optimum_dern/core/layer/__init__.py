"""A layer's experts as tensors: their segments, what they compute, what is known of them, what steps cost."""
