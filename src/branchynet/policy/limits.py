"""The limit under which `choose` looks for thresholds."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..argument_checks import check_fraction, real
from ..errors import InputError
from .values import PROMISED

SLACK = 1e-9
"""Limits are met within this tolerance, because decimals are rounded."""

_LARGE = 0.2  # a user hardly ever means a larger drop in accuracy


@dataclass(frozen=True)
class Limit:
    """A limit and its properties, which depend on its name.

    Attributes:
        name: the name of the argument of `choose`.
        value: the limit.
    """

    name: str
    value: float

    def __str__(self) -> str:
        return f"{self.name}={self.value:g}"

    @property
    def on_cost(self) -> bool:
        """Whether it bounds a cost, so that accuracy is maximised."""
        return self.name not in PROMISED

    @property
    def on_macs(self) -> bool:
        """Whether the cost is counted in multiply-accumulates."""
        return self.name == "max_macs"

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

    @property
    def suspicious(self) -> bool:
        """Whether it is so large that it may be meant in percent."""
        return not self.on_cost and not self.absolute and self.value > _LARGE

    def allowed_loss(self, losses: np.ndarray[Any, Any]) -> float:
        """Return the summed loss that it allows on samples with losses `(S, N)`; infinite for a limit on cost."""
        if self.on_cost:
            return math.inf
        return float(0.0 if self.absolute else losses[:, -1].sum()) + (self.risk + SLACK) * len(losses)

    @property
    def allowed_cost(self) -> float:
        """The mean cost that it allows; infinite for a limit on accuracy."""
        return self.value * (1 + SLACK) if self.on_cost else math.inf


def one_limit(limits: dict[str, float | None]) -> Limit:
    """Return the one limit that is not None. Raises `InputError` for none, several, or one that is out of range."""
    given = {name: real(name, value) for name, value in limits.items() if value is not None}
    if len(given) != 1:
        shown = " and ".join(f"{name}={value:g}" for name, value in given.items()) or "none"
        raise InputError(f"give exactly one of {', '.join(limits)}; got {shown}")
    ((name, value),) = given.items()
    limit = Limit(name, value)
    if name in ("max_drop", "max_disagreement"):
        check_fraction(name, value)
    if not limit.on_cost and not -1 <= value <= 1:
        raise InputError(f"{limit} is out of range: it is a fraction, such as 0.01 for one point")
    return limit
