"""How good a model is, before and after."""
