"""Clocks: calls take turns, weights are warm, and medians are taken."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchynet.policy.values import STEADY
from branchynet.profiling import clock
from branchynet.profiling.clock import at_one_pace, in_turns, interleaved, ratio_spread, spread_of, until_steady


class Clock:
    """Time that passes only in calls."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now)

    def call(self, name, durations):
        durations = itertools.cycle(durations)

        def run(*arguments):
            self.log.append((name, *arguments))
            self.now += next(durations)

        return run

    @property
    def names(self):
        return [name for name, *_ in self.log]


def test_long_calls_take_turns_and_medians_are_taken(monkeypatch):
    clock = Clock(monkeypatch)
    calls = [clock.call("a", [0.2, 0.2, 9.0]), clock.call("b", [0.1])]
    assert interleaved(calls, seconds=100.0, rounds=30) == pytest.approx([0.2e6, 0.1e6])
    assert clock.names == ["a", "b"] * 31  # a warm-up, then the rounds


def test_short_calls_are_timed_warm(monkeypatch):
    """The first call of a turn, which finds its weights cold, does not count."""
    clock = Clock(monkeypatch)
    calls = [clock.call("a", [0.03, 0.01, 0.01, 0.02, 0.02]), clock.call("b", [0.002])]
    clock.call("a", [0.0])
    for call in calls:
        call()
    calls[0] = clock.call("a", [0.5, *[0.03, 0.01, 0.01, 0.02, 0.02] * 5])  # the warm-up, then five turns
    clock.log.clear()
    assert interleaved(calls, seconds=0.0) == pytest.approx([0.015e6, 0.002e6])
    assert clock.names == ["a", "b", *(["a"] * 5 + ["b"] * 5) * 5]


@given(st.lists(st.floats(1, 100), min_size=1, max_size=4), st.lists(st.floats(0.5, 2), min_size=1, max_size=9))
def test_a_common_pace_is_removed(true, paces):
    """However the machine's pace changes from turn to turn, ratios are those of the calls."""
    found = at_one_pace(np.outer(true, paces).tolist())
    np.testing.assert_allclose(found, np.outer(true, np.full(len(paces), np.median(paces))))


def test_a_slow_turn_of_one_call_does_not_change_the_others():
    times = np.outer([3.0, 5.0, 7.0], np.ones(9))
    times[1, 4] = 1000.0
    np.testing.assert_allclose(np.median(at_one_pace(times), axis=1), [3.0, 5.0, 7.0])
    np.testing.assert_allclose(at_one_pace(times)[[0, 2]], times[[0, 2]])


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 5), (3.0, 10)])
def test_measuring_ends_in_time_but_not_before_five_rounds(monkeypatch, seconds, rounds):
    clock = Clock(monkeypatch)
    interleaved([clock.call("a", [0.25]), clock.call("b", [0.0625])], seconds)
    assert clock.names == ["a", "b"] * (rounds + 1)


def test_steady_calls_are_timed_once(monkeypatch):
    clock = Clock(monkeypatch)
    us, spread = until_steady([clock.call("a", [0.25]), clock.call("b", [0.0625])], seconds=3.0)
    assert us == [0.25e6, 0.0625e6] and spread == 0
    assert clock.names == ["a", "b"] * 11


def test_calls_are_timed_until_steady(monkeypatch):
    """One of them is slow at first, and the others go on as they were: no pace that they share."""
    clock = Clock(monkeypatch)
    slow = clock.call("a", [0.4] * 2 + [0.2] * 1000)  # the first of them warms up
    us, spread = until_steady([slow, clock.call("b", [0.1]), clock.call("c", [0.1])], seconds=2.0)
    assert us == pytest.approx([0.2e6, 0.1e6, 0.1e6]) and spread <= STEADY
    assert 8 < len(clock.log) / 3 < 24


def test_unsteady_calls_are_timed_four_times_as_long_and_reported(monkeypatch):
    clock = Clock(monkeypatch)
    wild = clock.call("a", [0.1] * 5 + [0.3] * 5)
    us, spread = until_steady([wild, clock.call("b", [0.1]), clock.call("c", [0.1])], seconds=2.0)
    assert spread > 0.2 and us[1:] == pytest.approx([0.1e6, 0.1e6])
    assert 4 * 2.0 <= clock.now < 4 * (2.0 + 1.0)


@given(st.lists(st.floats(1, 100), min_size=2, max_size=4), st.integers(5, 60), st.floats(0, 0.5))
def test_the_spread_is_of_the_least_certain_call(true, turns, swing):
    """Half of the blocks of one call are off by a share; scale is no matter, and nor are the others."""
    times = np.outer(true, np.ones(turns))
    assert spread_of(times) == pytest.approx(0, abs=1e-12)
    steps = np.array([1, -1, 1, -1, 1]) * swing
    times[1] *= np.repeat(1 + steps, [len(block) for block in np.array_split(times[1], 5)])
    want = 2.776 * steps.std(ddof=1) / np.sqrt(5) / (1 + steps.mean())
    assert spread_of(times) == pytest.approx(want, abs=1e-9)
    assert spread_of(1000 * times) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("size", [16, 32])  # four calls are 64 samples; two would be, but a turn has at least four
def test_passes_go_over_all_batches_in_turns_and_the_first_does_not_count(size, monkeypatch):
    clock = Clock(monkeypatch)
    slow, fast = clock.call("slow", [9.0] * 5 + [0.2] * 10), clock.call("fast", [0.1])
    batches = [(np.full(size, n),) for n in range(5)]
    found = in_turns({"slow": slow, "fast": [fast] * 5}, batches, repeats=2)
    assert found == pytest.approx({"slow": 1e6 / (5 * size), "fast": 0.5e6 / (5 * size)})
    assert len(clock.log) == 2 * 5 * 3
    for name in ("slow", "fast"):
        assert [int(entry[1][0]) for entry in clock.log if entry[0] == name] == [0, 1, 2, 3, 4] * 3
    one = clock.names[:10]
    assert one in (
        ["fast"] * 4 + ["slow"] * 5 + ["fast"],
        ["slow"] * 4 + ["fast"] * 5 + ["slow"],
    )
    with pytest.raises(ValueError, match="zip"):
        in_turns({"few": [fast] * 4}, batches, repeats=1)


def test_the_spread_of_a_speed_up_pairs_passes():
    rng = np.random.default_rng(0)
    pace = 1 + rng.random(15)  # slows both equally
    assert ratio_spread(80 * pace, 50 * pace) == pytest.approx(0, abs=1e-9)  # rounding alone
    assert ratio_spread(80 * pace, np.full(15, 50.0)) > STEADY
    assert ratio_spread(np.ones(4), np.ones(4)) is None
