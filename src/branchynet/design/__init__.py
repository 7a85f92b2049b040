"""Where the exits should go and whether they help: candidates on a trained trunk, timed and tried together.

`candidates` puts branches of several sizes on the trunk as one network with many exits, `part_times` times its parts,
`exit_search` searches for the exits that together take least, and `advising` does it all.
"""

from .advice import Advice
from .advising import advise
from .options import SearchOptions

__all__ = ["Advice", "SearchOptions", "advise"]
