"""``python -m branchynet`` is the command line."""

from .cli.verbs import main

main()
