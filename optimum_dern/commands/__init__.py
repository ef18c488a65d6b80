"""The command line, as `optimum-dern ...` and as `optimum-cli dern ...`."""
