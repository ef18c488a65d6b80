"""The source checkpoint: finding and downloading it, checking it, and loading it one decoder layer at a time."""
