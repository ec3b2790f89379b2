"""The command line: a thin shell over the functions that do the work."""

from workers.cli.main import main

__all__ = ["main"]
