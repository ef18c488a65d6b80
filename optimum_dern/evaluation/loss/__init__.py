"""Cross-entropy on texts, of a model in memory or streamed from disk, also as metrics for Trainer and `evaluate`."""
