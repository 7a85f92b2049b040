"""Small values, and a full disk."""

import contextlib
import dataclasses
import io
import resource

import numpy as np

from branchynet.policy.exit_cost import ExitCost
from branchynet.policy.exit_record import ExitRecord
from branchynet.policy.values import Choice, Outcome, Policy


def a_record(samples=6, exits=3, classes=4):
    rng = np.random.default_rng(0)
    return ExitRecord(rng.normal(size=(samples, exits, classes)), rng.integers(0, classes, samples))


def a_cost():
    return ExitCost((1.5, 2.0), (0.25, 0.0), (100, 200), (10, 0), batch_size=8, threads=2)


def a_choice():
    outcome = Outcome(4, 0.75, (0.3, 0.95), 0.75, (1.0, 0.0), (0.75, None), mean_us=1.75, mean_macs=110.0)
    return Choice(Policy("entropy", (0.1, None)), {"max_drop": 0.01}, outcome, "00ff")


@contextlib.contextmanager
def full_disk(limit):
    """Limit the size of files to `limit` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def npz(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


GOOD = {**dataclasses.asdict(a_choice()), "policy": a_choice().policy.to_json()}
