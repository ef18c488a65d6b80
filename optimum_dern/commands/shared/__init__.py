"""What commands have in common: options, their checks, and tables."""
