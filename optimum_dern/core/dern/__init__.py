"""DERN on one layer (arXiv 2509.10377): assignment, clustering and merging of neuron segments."""
