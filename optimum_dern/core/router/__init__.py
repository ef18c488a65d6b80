"""Routers: weight rows of the retained experts, and routing rules inferred from calibration tokens."""
