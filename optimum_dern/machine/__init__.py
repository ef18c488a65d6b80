"""Machine-level support of a run: threads, devices, processes, memory and scratch files."""
