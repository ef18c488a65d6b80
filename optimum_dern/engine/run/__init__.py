"""A whole compression run: checks, preparation, compression in memory or from disk to disk, and its report."""
