"""Find the best exits for a trained network.

`candidates` attaches branches of several sizes to the trunk, as one network with many exits. `part_times` times its
parts, `exit_search` finds the fastest set of exits, and `advising` runs all steps.
"""

from .advice import Advice
from .advising import advise
from .options import SearchOptions

__all__ = ["Advice", "SearchOptions", "advise"]
