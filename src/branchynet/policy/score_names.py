"""The names of scores, without PyTorch: engines and stored policies read them."""

from typing import Any

from ..argument_checks import described
from ..errors import InputError, nearest

NAMES = ("entropy", "max_probability", "margin", "patience", "agreement")
"""The names in `branchynet.policy.scores`; a test compares both."""


class KnownByName(str):
    """The name of a score that is not in `NAMES`: that of a callable in a record or a stored policy."""


def check_score(score: Any) -> None:
    """Raise `InputError` unless `score` is a name in `NAMES`, a callable, or `KnownByName`."""
    if callable(score) or isinstance(score, KnownByName) or (isinstance(score, str) and score in NAMES):
        return
    if not isinstance(score, str):
        raise InputError(f"score must be a name or a callable; got {described(score)}: take one of {', '.join(NAMES)}")
    raise InputError(f"unknown score {score!r}{nearest(score, NAMES)}; or pass a callable")


def stored_name(score: str) -> str:
    """Return a name in `NAMES` unchanged, and any other as `KnownByName`."""
    return score if score in NAMES else KnownByName(score)
