"""Run a layer of the original model and record what its compression needs: routing, outputs, statistics."""
