"""Results of a compression as plain data: the report, its descriptions and statistics."""
