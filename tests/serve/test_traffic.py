"""The traffic of the last minute, against an oracle that keeps every request."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from branchynet.serve.traffic import SECONDS, STEP, Traffic

requests = st.tuples(
    st.dictionaries(st.integers(1, 4), st.integers(1, 9), min_size=1),
    st.floats(2e-6, 90.0),  # seconds, within the bins
    st.sampled_from([0.0, 0.3, 1.0, 7.5, 59.0, 61.0]),  # until the next request
)


@given(st.lists(requests, max_size=30), st.sampled_from([0.0, 0.9, 30.0, 59.9, 60.0, 200.0]))
def test_samples_per_second_and_percentiles_are_those_of_the_last_minute(script, rest):
    now, held = 1000.25, []
    traffic = Traffic(clock=lambda: now)
    for samples, seconds, pause in script:
        traffic.add(samples, seconds)
        held.append((int(now), samples, seconds))
        now += pause
    now += rest
    found = traffic.last_minute()
    held = [(int(now) - second, samples, seconds) for second, samples, seconds in held if int(now) - second < SECONDS]
    wanted = {}
    for age, samples, _ in held:
        for exit, count in samples.items():
            wanted.setdefault(str(exit), [0] * SECONDS)[SECONDS - 1 - age] += count
    assert found["exits"] == wanted
    assert found["requests"] == len(held)
    for name, share in (("p50_us", 50), ("p99_us", 99)):
        if not held:
            assert found[name] is None
            continue
        exact = 1e6 * np.percentile([seconds for _, _, seconds in held], share, method="inverted_cdf")
        assert exact * (1 - 1e-9) <= found[name] <= exact * STEP * (1 + 1e-9)  # rounding of the product


def test_latencies_beyond_the_bins_count_as_the_longest():
    traffic = Traffic()
    traffic.add({1: 1}, 1e9)
    assert traffic.last_minute()["p99_us"] >= 95e6
