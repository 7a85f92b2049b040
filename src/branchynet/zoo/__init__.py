"""Networks of the paper, with and without branches, and their trained weights."""

from .lenet import b_lenet, lenet

__all__ = ["b_lenet", "lenet"]
