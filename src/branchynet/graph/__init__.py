"""Graphs of a network: flat export, the cut at its exits, and nested exits."""

from ..environment import EXPORTING, require

require(*EXPORTING)  # first: the imports below fail with other versions
