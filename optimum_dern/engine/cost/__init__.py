"""What a compression takes, predicted from shapes alone: memory, disk and time."""
