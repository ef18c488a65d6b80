"""Calibration data: from whatever the user has to batches of tokens."""
