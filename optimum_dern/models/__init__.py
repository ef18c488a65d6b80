"""Access to transformers' Mixture-of-Experts models: finding, checking, reading and rewriting their MoE layers."""
