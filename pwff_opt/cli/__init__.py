"""The command line."""

from pwff_opt.cli.app import main

__all__ = ["main"]
