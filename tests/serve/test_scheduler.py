"""The scheduler, against an oracle that keeps lists and reads the rules literally. Time is a number."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchynet.errors import InputError
from branchynet.serve.faults import QueueFull
from branchynet.serve.scheduler import Scheduler
from branchynet.serve.tickets import StageLimit, Ticket, stage_limits

STEP = 0.125  # times are multiples of it, so sums and differences are exact


@dataclass(eq=False)
class Waiting:
    """Samples of one ticket that came to a stage together."""

    ticket: Ticket
    rows: list[int]
    since: float


@dataclass
class Oracle:
    limits: list[StageLimit]
    max_wait: float
    queues: list[list[Waiting]] = field(default_factory=list)
    took: list[list[float]] = field(default_factory=list)

    def __post_init__(self):
        self.queues = [[] for _ in self.limits]
        self.took = [[] for _ in self.limits]

    def p95(self, stage):
        last = self.took[stage][-64:]
        return np.percentile(last, 95, method="inverted_cdf") if last else self.limits[stage].expected

    def ahead(self, stage):
        return sum(self.p95(n) for n in range(stage, len(self.limits)))

    def due(self, stage, now):
        queue = self.queues[stage]
        if not queue:
            return False
        full = sum(len(one.rows) for one in queue) >= self.limits[stage].rows
        patience = self.p95(stage) if stage else self.max_wait
        waited = min(one.since for one in queue) + patience <= now
        return full or waited or any(one.ticket.deadline - self.ahead(stage) <= now for one in queue)

    def stage(self, now):
        due = [n for n in range(len(self.limits)) if self.due(n, now)]
        later = [n for n in range(1, len(self.limits)) if self.queues[n]]
        return due[-1] if due else (later[0] if later else None)

    def batch(self, now):
        """The stage that runs, and its samples, as pairs of ticket and position."""
        if (stage := self.stage(now)) is None:
            return None
        queue, soon = self.queues[stage], now + self.ahead(stage)
        urgent = sorted((one for one in queue if one.ticket.deadline <= soon), key=lambda one: one.ticket.deadline)
        order = [*urgent, *(one for one in queue if one not in urgent)]
        order = [one for one in order if one.ticket.kind == order[0].ticket.kind]
        found = []
        for one in order:
            take = one.rows[: self.limits[stage].rows - len(found)]
            found += [(one.ticket, row) for row in take]
            one.rows = one.rows[len(take) :]
        self.queues[stage] = [one for one in queue if one.rows]
        return stage, found

    def forget(self, ticket):
        self.queues = [[one for one in queue if one.ticket is not ticket] for queue in self.queues]

    def wake(self, now):
        if any(self.queues[1:]):
            return now
        queue = self.queues[0]
        if not queue:
            return None
        at = min(min(one.since + self.max_wait, one.ticket.deadline - self.ahead(0)) for one in queue)
        return now if self.due(0, now) else at


class World:
    """Both, and what every sample of every ticket has seen."""

    def __init__(self, limits, max_wait, bound, most_wait=math.inf):
        self.scheduler = Scheduler(limits, max_wait=max_wait, bound=bound, most_wait=most_wait)
        self.oracle = Oracle(limits, max_wait)
        self.bound, self.most_wait, self.now = bound, most_wait, 0.0
        self.busy, self.gone = [sum(one.expected for one in limits)], [1]  # per batch
        self.tickets, self.open, self.left, self.running = [], {}, {}, []

    def waiting(self):
        return sum(ticket.rows - len(self.left[ticket]) for ticket in self.open)

    def delay(self):
        """Seconds until all that wait have left, by the batches so far; older ones count less."""
        weights = 0.98 ** np.arange(len(self.busy))[::-1]
        return self.waiting() * (weights @ self.busy) / max(weights @ self.gone, 1e-9)

    def submit(self, rows, kind, within):
        ids = np.array([1000 * len(self.tickets) + row for row in range(rows)])
        ticket = Ticket(rows, ids, kind, self.now + within)
        if rows > self.bound:
            with pytest.raises(InputError):
                self.scheduler.submit(ticket, self.now)
        elif self.waiting() + rows > self.bound or (self.waiting() and self.delay() > self.most_wait):
            with pytest.raises(QueueFull) as full:
                self.scheduler.submit(ticket, self.now)
            assert full.value.retry_after == pytest.approx(self.delay())
        else:
            self.scheduler.submit(ticket, self.now)
            self.oracle.queues[0].append(Waiting(ticket, list(range(rows)), self.now))
            self.left[ticket], self.open[ticket] = set(), len(self.tickets)
        self.tickets.append(ticket)

    def cancel(self, which):
        if self.tickets:
            ticket = self.tickets[which % len(self.tickets)]
            if ticket in self.left:
                self.scheduler.cancel(ticket)
                self.close(ticket)

    def close(self, ticket):
        self.oracle.forget(ticket)
        self.open.pop(ticket, None)

    def expire(self):
        waits = {one.ticket for queue in self.oracle.queues for one in queue}
        late = self.scheduler.expired(self.now)
        assert set(late) == {ticket for ticket in waits if ticket.deadline <= self.now}
        assert len(late) == len(set(late))
        for ticket in late:
            self.close(ticket)

    def take(self):
        """Take a batch if there is one."""
        self.expire()
        wake = self.oracle.wake(self.now)
        wanted = self.oracle.batch(self.now)
        assert (wake is not None and wake <= self.now) == (wanted is not None)
        batch = self.scheduler.next_batch(self.now)
        if wanted is None:
            assert batch is None and self.scheduler.wake_at(self.now) == wake
            return False
        stage, samples = wanted
        assert batch.stage == stage and batch.rows == len(samples) <= self.oracle.limits[stage].rows
        assert [(part.ticket, row) for part in batch.parts for row in part.rows.tolist()] == samples
        for part in batch.parts:
            ids = part.held[part.start : part.start + len(part.rows)]
            assert ids.tolist() == [1000 * self.tickets.index(part.ticket) + row for row in part.rows]
        self.running.append((batch, samples))
        return True

    def finish(self, which, leaves):
        """Finish one of the batches that run; `leaves` repeats."""
        batch, samples = self.running.pop(which % len(self.running))
        last = batch.stage == len(self.oracle.limits) - 1
        leave = np.array([last or leaves[i % len(leaves)] for i in range(batch.rows)])
        ids = np.array([1000 * self.tickets.index(ticket) + row for ticket, row in samples])
        done = self.scheduler.finished(batch, leave, ids[~leave], self.now)
        self.oracle.took[batch.stage].append(self.now - batch.started)
        self.busy.append(self.now - batch.started)
        self.gone.append(leave.sum())
        at, complete = 0, []
        for part in batch.parts:
            rows, here = part.rows.tolist(), leave[at : at + len(part.rows)]
            at += len(rows)
            if part.ticket not in self.open:
                continue
            gone = {row for row, leaves_here in zip(rows, here, strict=True) if leaves_here}
            assert not gone & self.left[part.ticket]  # answered once
            self.left[part.ticket] |= gone
            if staying := [row for row in rows if row not in gone]:
                self.oracle.queues[batch.stage + 1].append(Waiting(part.ticket, staying, self.now))
            if len(self.left[part.ticket]) == part.ticket.rows:
                complete.append(part.ticket)
        assert done == complete
        for ticket in done:
            assert ticket.closed
            self.close(ticket)


limit = st.builds(StageLimit, st.integers(1, 5), st.integers(0, 8).map(lambda n: n * STEP))
steps = st.integers(0, 6).map(lambda n: n * STEP)
requests = st.tuples(
    st.integers(1, 7), st.integers(0, 1), st.one_of(st.just(math.inf), st.integers(1, 24).map(lambda n: n * STEP))
)
turns = st.tuples(
    st.lists(requests, max_size=2),
    st.one_of(st.none(), st.none(), st.none(), st.integers(0, 20)),  # a ticket to cancel
    steps,
    st.sampled_from(["take", "take", "both", "both", "finish"]),
    st.lists(st.booleans(), min_size=1, max_size=6),
)


@settings(max_examples=300)
@given(
    st.lists(limit, min_size=2, max_size=3),
    st.sampled_from([0.0, STEP, 8 * STEP]),
    st.integers(4, 30),
    st.sampled_from([math.inf, math.inf, 3.01]),  # no sum of steps, which rounding could put on either side
    st.lists(turns, min_size=1, max_size=40),
)
def test_every_sample_is_answered_once_in_batches_that_the_rules_name(limits, max_wait, bound, most_wait, script):
    world = World(limits, max_wait, bound, most_wait)
    for submitted, cancelled, passed, action, leaves in script:
        for one in submitted:
            world.submit(*one)
        if cancelled is not None:
            world.cancel(cancelled)
        world.now += passed
        if action != "finish" and len(world.running) < 2:
            world.take()
        world.now += passed
        if action != "take" and world.running:
            world.finish(0, leaves)
        assert world.scheduler.waiting == world.waiting() <= bound
    drain(world, [passed for _, _, passed, _, _ in script])


def drain(world, passed):
    """Run all that waits, with a clock that jumps to when the scheduler wants to be asked again: nothing starves."""
    turns = 2 * len(world.oracle.limits) * (sum(ticket.rows for ticket in world.open) + len(world.running)) + 1
    while world.open or world.running:
        turns -= 1
        assert turns >= 0, "a sample starves"
        if world.running:
            world.now += passed[turns % len(passed)]
            world.finish(0, [True, False])
        elif not world.take() and world.open:
            wake = world.scheduler.wake_at(world.now)
            assert wake is not None and wake > world.now
            world.now = wake
    assert world.scheduler.waiting == 0 and world.scheduler.next_batch(world.now) is None
    assert world.scheduler.wake_at(world.now) is None


def test_a_worker_that_is_idle_does_not_wait():
    scheduler = Scheduler([StageLimit(8), StageLimit(8)])
    scheduler.submit(Ticket(1), 0.0)
    batch = scheduler.next_batch(0.0)
    assert batch is not None and batch.rows == 1
    scheduler.finished(batch, np.array([False]), None, 0.0)
    later = scheduler.next_batch(0.0)
    assert later is not None and later.stage == 1


def test_a_later_stage_waits_for_company_while_the_first_is_busy_and_no_longer_than_it_runs():
    scheduler = Scheduler([StageLimit(2, 1.0), StageLimit(4, 3.0)])
    stages, now = [], 0.0
    for _ in range(8):
        scheduler.submit(Ticket(2), now)
        batch = scheduler.next_batch(now)
        stages.append(batch.stage)
        now += 1.0 if batch.stage == 0 else 3.0
        scheduler.finished(batch, np.array([True, False] if batch.stage == 0 else [True] * batch.rows), None, now)
    assert stages == [0, 0, 0, 0, 1, 0, 0, 0]  # full at four samples, three seconds after the first


def test_limits_follow_the_expected_microseconds():
    found = stage_limits([0.1, 0.2, 0.3], 64, sample_us=[10.0, 0.0, 300.0], most_us=200.0)
    assert [one.rows for one in found] == [20, 64, 1] and [one.expected for one in found] == [0.1, 0.2, 0.3]
    assert [one.rows for one in stage_limits([0.1, 0.2], 64, sample_us=[10.0, 20.0])] == [64, 64]
    assert [one.rows for one in stage_limits([0.1, 0.2], 64, most_us=10.0)] == [64, 64]


def test_the_delay_that_a_full_queue_names_is_that_of_its_samples():
    scheduler = Scheduler([StageLimit(10, 0.5)], bound=20)
    now = 0.0
    for _ in range(400):  # ten samples take half a second
        scheduler.submit(Ticket(10), now)
        batch = scheduler.next_batch(now)
        now += 0.5
        scheduler.finished(batch, np.ones(10, bool), None, now)
    scheduler.submit(Ticket(20), now)
    with pytest.raises(
        QueueFull, match="20 of at most 20 samples wait for about 1 s, and this request has 1 more"
    ) as full:
        scheduler.submit(Ticket(1), now)
    assert full.value.retry_after == pytest.approx(1.0, rel=0.01)  # what is left of the guess at the start


@pytest.mark.parametrize("rows", [0, 21])
def test_a_request_that_never_fits_is_an_error(rows):
    with pytest.raises(InputError, match=f"1 to 20 samples.*got {rows}"):
        Scheduler([StageLimit(8)], bound=20).submit(Ticket(rows), 0.0)


@given(st.lists(st.integers(0, 20).map(lambda n: n * STEP), min_size=1, max_size=150))
def test_the_typical_time_is_the_median_of_the_last_64_batches(durations):
    scheduler, now = Scheduler([StageLimit(1)]), 0.0
    for n, seconds in enumerate(durations, 1):
        scheduler.submit(Ticket(1), now)
        batch = scheduler.next_batch(now)
        now += seconds
        scheduler.finished(batch, np.array([True]), None, now)
        assert scheduler.typical == np.percentile(durations[max(0, n - 64) : n], 50, method="higher")
