"""Records and costs for policies, so small that tests can try all thresholds."""

import itertools
import math

import numpy as np
from hypothesis import strategies as st

from branchynet.policy.exit_cost import ExitCost
from branchynet.policy.exit_record import ExitRecord
from branchynet.policy.values import Policy


def logits_record(samples, exits, classes=4, seed=0):
    """Deeper exits are better, and hard samples are hard for all exits."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, samples)
    outputs = rng.normal(size=(samples, exits, classes))
    outputs[np.arange(samples), :, labels] += 1.5 + np.arange(exits) - 1.5 * rng.normal(size=(samples, 1))
    return ExitRecord(2 * outputs, labels)


def a_cost(exits, trunk=20.0, branch=5.0):
    return ExitCost((trunk,) * exits, (branch,) * (exits - 1) + (0.0,), (100.0,) * exits, (7.0,) * (exits - 1) + (0.0,))


@st.composite
def small_records(draw, exits=None, most=10, levels=4):
    """Few samples with few distinct scores, so that all thresholds can be tried; NaN and infinity among them."""
    exits = draw(st.integers(1, 4)) if exits is None else exits
    samples = draw(st.integers(1, most))
    values = st.sampled_from([*np.linspace(0, 1, levels), math.nan, math.inf])
    rows = st.lists(st.lists(values, min_size=exits, max_size=exits), min_size=samples, max_size=samples)
    wrong = st.lists(
        st.lists(st.sampled_from([0.0, 1.0]), min_size=exits, max_size=exits), min_size=samples, max_size=samples
    )
    return ExitRecord.from_scores(draw(rows), draw(wrong))


@st.composite
def costs(draw, exits):
    each = st.lists(st.sampled_from([0, 1, 2, 9]), min_size=exits, max_size=exits)
    return ExitCost(tuple(draw(each)), tuple(draw(each)))


def every_policy(record):
    """All thresholds that can route this record differently."""
    for_each = []
    for column in record.scores[:, :-1].T:
        values = np.unique(column[np.isfinite(column)])
        middles = [float(v) for v in (values[:-1] + values[1:]) / 2]
        for_each.append([None, *middles, *([float(values[-1]) + 1] if len(values) else [])])
    return [Policy("entropy", thresholds) for thresholds in itertools.product(*for_each)]


def entropies(record):
    z = record.outputs.astype(np.float64)
    p = np.exp(z - z.max(axis=2, keepdims=True))
    p /= p.sum(axis=2, keepdims=True)
    return (-(p * np.log(p)).sum(axis=2)).astype(np.float32)
