"""The engine: one decoder layer at a time."""
