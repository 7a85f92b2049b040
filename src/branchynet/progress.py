"""Messages of long steps."""

import sys


def report_progress(progress: bool, line: str) -> None:
    """Print a line on standard error and flush it, so that log files show it at once."""
    if progress:
        print(line, file=sys.stderr, flush=True)
