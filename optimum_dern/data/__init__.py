"""Calibration data: loading text, files and datasets into batches of tokens."""
