"""Tools that prepare data: `python -m experiments.tools.<name> --help`."""
