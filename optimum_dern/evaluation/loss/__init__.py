"""Cross-entropy of texts, in memory, a layer at a time, and as metrics for Trainer and evaluate."""
