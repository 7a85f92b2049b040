"""Names of values in an ONNX file, as names of submodules and parameters."""

import re
from collections.abc import Iterable

from torch import nn


def module_names(values: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """Return a different name for every value: a valid name of a submodule, and the value's own where that is possible.

    Args:
        values: the names in the file, in order.
        taken: further names that are in use.
    """
    found: dict[str, str] = {}
    used = set(taken)
    for value in values:
        name = re.sub(r"\W", "_", value, flags=re.ASCII).strip("_") or "value"
        name = f"value_{name}" if name[0].isdigit() else name
        chosen, number = name, 2
        while chosen in used or hasattr(nn.Module, chosen) or chosen in _ATTRIBUTES:
            chosen, number = f"{name}_{number}", number + 1
        used.add(chosen)
        found[value] = chosen
    return found


_ATTRIBUTES = frozenset(vars(nn.Module()))
