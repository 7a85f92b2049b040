"""The command line: ``branchynet`` and ``python -m branchynet``, with a message if its extra is not installed."""

import sys

from .errors import MissingExtraError
from .extras import needed_by


def main() -> None:
    """Run the command line."""
    try:
        with needed_by("the command line", extra="cli"):
            from .cli.program import main as run
    except MissingExtraError as error:
        sys.exit(f"error: {error}")
    run()


if __name__ == "__main__":
    main()
