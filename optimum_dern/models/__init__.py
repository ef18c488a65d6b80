"""The only place that knows how transformers lays out a Mixture-of-Experts model."""
