"""Data for the report's plots of a layer; the compression does not depend on it."""
