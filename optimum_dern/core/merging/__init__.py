"""Building blocks of expert merging: similarity, grouping, neuron alignment and averaging."""
