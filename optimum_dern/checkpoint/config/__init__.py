"""config.json of a compressed checkpoint, in the forms that all readers know."""
