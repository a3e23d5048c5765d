"""The command line."""

from pwff_opt.cli.app import app, main

__all__ = ["app", "main"]
