"""One offline HTML page about a run, and its figures by themselves. Reads values only: no network, no search."""

from .gallery import Gallery
from .html import write_report
from .plots import figure_leaving, figure_scores, figure_shares, figure_tradeoff

__all__ = ["Gallery", "figure_leaving", "figure_scores", "figure_shares", "figure_tradeoff", "write_report"]
