"""Comparison of several models in quality, speed and memory, each in a process of its own."""
