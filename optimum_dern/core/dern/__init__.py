"""DERN on one layer (arXiv 2509.10377): segments are assigned, clustered and merged."""
