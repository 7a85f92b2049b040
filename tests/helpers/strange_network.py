"""A function that a run folder may name as its network, which must not be called."""

CALLED: list[str] = []


def network():
    CALLED.append("network")
    raise AssertionError("called")
