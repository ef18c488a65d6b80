"""Commands that measure and show models, and write nothing of them."""
