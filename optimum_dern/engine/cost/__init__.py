"""Predictions of the memory, disk space and time that a compression takes, from tensor shapes alone."""
