"""Calibration sequences that are made instead of read: text that the model writes itself, and random tokens."""
