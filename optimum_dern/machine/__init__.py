"""The machine that a run is on: its processors, devices, processes and disks."""
