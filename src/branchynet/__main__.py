"""``python -m branchynet`` is the command line."""

from .cli import main

main()
