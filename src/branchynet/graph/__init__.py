"""Graphs: exporting a network flat, cutting it at its exits, nesting the exits."""
