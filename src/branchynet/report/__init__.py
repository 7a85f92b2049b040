"""One offline HTML page about a run, and its figures. Reads values only: no network, no search."""

from ..extras import first_used

# Imported on first use: the tables for the terminal do not need matplotlib. __init__.pyi has the types.
_MODULES = {
    "gallery": ("Gallery",),
    "html": ("RunReport", "write_report"),
    "plots": ("figure_leaving", "figure_scores", "figure_shares", "figure_tradeoff"),
}
__getattr__ = first_used(__name__, _MODULES, "report")
__all__ = sorted(name for names in _MODULES.values() for name in names)  # pyright: ignore[reportUnsupportedDunderAll]
