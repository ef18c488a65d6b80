"""Condensing as a run of the compressor from disk to disk."""
