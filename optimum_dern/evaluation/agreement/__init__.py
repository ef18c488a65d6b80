"""Agreement with the original model, whose predictions are kept on disk."""
