"""The command line, in both spellings: `optimum-dern ...` and `optimum-cli dern ...`."""
