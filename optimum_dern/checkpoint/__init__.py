"""Checkpoints on disk: reading the source, writing the compressed one, and publishing it on the Hub."""
