"""What a run reports, as plain data."""
