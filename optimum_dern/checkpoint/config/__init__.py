"""config.json of a compressed checkpoint, readable by transformers 4 and 5 and by other libraries."""
