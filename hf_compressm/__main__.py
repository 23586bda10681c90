"""`python -m hf_compressm`: the command line."""

from .cli import main

main()
