"""Graphs: exporting a network flat, cutting it at its exits, nesting the exits."""

from ..environment import EXPORTING, require

require(*EXPORTING)  # before modules of theirs are imported that other versions do not have
