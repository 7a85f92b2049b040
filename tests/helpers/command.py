"""Call the command line as a user does."""

import sys

import pytest

from branchynet.cli import program

PAPER = ("--network", "b_lenet-published")


def call(monkeypatch, *arguments):
    """Run the command line in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["branchynet", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        program.main()
        raise SystemExit(0)
    return stop.value.code or 0
