"""The command line: one file per group of commands."""

from unidiff.cli.app import app, main, recipe

__all__ = ["app", "main", "recipe"]
