"""Calibration: any form of data to token batches, and what the layers see of them."""
