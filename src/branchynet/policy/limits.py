"""The limit that the thresholds of `choose` must keep."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..argument_checks import check_fraction, real
from ..errors import InputError
from .values import BOUNDS, PROMISED

SLACK = 1e-9
"""Limits are met within this tolerance, because decimals are rounded."""

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "max_drop": (
        lambda value: -1 < value < 1,
        "between -1 and 1, such as 0.01 for one point less accuracy than the last exit, or -0.01 for one point more",
    ),
    "max_disagreement": (
        lambda value: 0 <= value < 1,
        "from 0 to below 1, such as 0.01 for one sample in a hundred with another class than the last exit",
    ),
    "min_accuracy": (lambda value: 0 <= value <= 1, "from 0 to 1, such as 0.99 for 99%"),
}


@dataclass(frozen=True)
class Limit:
    """The name of an argument of `choose`, and its value."""

    name: str
    value: float

    def __str__(self) -> str:
        return f"{self.name}={self.value:g}"

    @property
    def on_cost(self) -> bool:
        """Whether it bounds a cost."""
        return self.name not in PROMISED

    @property
    def without_labels(self) -> bool:
        """Whether the labels of the last exit replace the true labels."""
        return self.name == "max_disagreement"

    @property
    def absolute(self) -> bool:
        """Whether it bounds the loss itself, not the difference from that of the last exit."""
        return self.name == "min_accuracy"

    @property
    def risk(self) -> float:
        """The mean loss, or mean difference from the loss of the last exit, that it allows."""
        return 1 - self.value if self.absolute else self.value

    @property
    def signed(self) -> bool:
        """Whether answers that leaving early corrects offset those that it makes wrong."""
        return self.name == "max_drop"

    def allowed_loss(self, losses: np.ndarray[Any, Any]) -> float:
        """Return the summed loss that it allows on samples with losses `(S, N)`; infinite for a limit on cost."""
        if self.on_cost:
            return math.inf
        return float(0.0 if self.absolute else losses[:, -1].sum()) + (self.risk + SLACK) * len(losses)

    def last_accuracy(self, losses: np.ndarray[Any, Any]) -> str:
        """Say which accuracy the last exit has on samples with losses `(S, N)`, if the limit is relative to it."""
        return f", and the last exit has {1 - losses[:, -1].mean():.4f}" if self.signed else ""

    @property
    def remedy(self) -> str:
        """What to do if nothing meets it."""
        return f"{'lower' if self.absolute else 'raise'} the limit"

    @property
    def allowed_cost(self) -> float:
        """The mean cost that it allows; infinite for a limit on accuracy."""
        return self.value * (1 + SLACK) if self.on_cost else math.inf


def check_limit(
    confidence: float | None, bound: str | None = None, **limits: float | None
) -> tuple[Limit, float | None]:
    """Return the one limit that is not None, and the confidence. Raises `InputError` for arguments out of range."""
    confidence = None if confidence is None else real("confidence", confidence)
    if confidence is not None and not 0 < confidence < 1:
        raise InputError(f"confidence={confidence:g} must lie between 0 and 1, such as 0.95; or None for no promise")
    if bound not in (None, *BOUNDS):
        raise InputError(f"unknown bound {bound!r}; take one of {', '.join(BOUNDS)}, or None for the sharper")
    given = {name: real(name, value) for name, value in limits.items() if value is not None}
    if len(given) != 1:
        shown = " and ".join(f"{name}={value:g}" for name, value in given.items()) or "none"
        raise InputError(f"give exactly one of {', '.join(limits)}; got {shown}")
    ((name, value),) = given.items()
    limit = Limit(name, value)
    if name in _RANGES:
        if not limit.absolute:
            check_fraction(name, value)
        fits, lies = _RANGES[name]
        if not fits(value):
            raise InputError(f"{limit} is out of range: give a fraction {lies}")
    return limit, confidence
