"""Integrations with transformers (loading, Trainer), router distillation and lm-eval."""
