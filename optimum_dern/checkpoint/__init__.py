"""Checkpoints on disk."""

WORK_NAME = ".dern"  # working folder of an unfinished run inside its output
