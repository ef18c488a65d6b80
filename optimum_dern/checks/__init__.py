"""Checks of what users give to functions: the kinds of arguments, and token batches."""
