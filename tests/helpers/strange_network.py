"""A function that a run folder may name as its network, but that must not be called."""

CALLED: list[str] = []


def network():
    CALLED.append("network")
    raise AssertionError("called")
