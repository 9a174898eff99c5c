"""The command line: one module for each kind of command."""

from .main import build_parser, main

__all__ = ["build_parser", "main"]
