"""A whole run: checked, prepared, carried out in memory or from disk to disk, reported."""
