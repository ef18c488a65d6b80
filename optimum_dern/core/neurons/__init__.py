"""Importance of single neurons, and the choice of those that an expert keeps."""
