"""MoE layers of transformers models: finding them by parameter shapes, reading and rewriting them."""
