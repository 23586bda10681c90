"""The command line `hf-compressm`."""

from .app import main

__all__ = ["main"]
