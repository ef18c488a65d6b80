"""Checkpoints on disk: reading the source, writing the compressed one, and publishing it on the Hub."""

WORK_NAME = ".dern"  # working folder of an unfinished run inside its output folder
