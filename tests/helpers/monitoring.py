"""Records and streams of scores for monitors and controllers."""

import sys
import threading

import numpy as np

from branchynet.monitor.martingale import CHUNK
from branchynet.monitor.predictions import predicted
from branchynet.policy.exit_cost import ExitCost
from branchynet.policy.exit_record import ExitRecord
from branchynet.policy.values import Choice, Outcome, Policy

POLICY = Policy(thresholds=(0.1, 0.3))


COST = ExitCost((20, 30, 50), (5, 5, 0))


def scores_of(samples, seed=0, shift=0.0):
    """Draw scores (S, 3) like entropies: hard samples are hard for all exits, and `shift` makes all samples harder."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(size=(samples, 1)) + 0.5 * rng.normal(size=(samples, 3))
    return np.exp(-4 + 2 * hard + shift - np.arange(3)).astype(np.float32)


def record_of(samples, seed=0, shift=0.0):
    return ExitRecord.from_scores(scores_of(samples, seed, shift), np.zeros((samples, 3)))


def stream_of(samples, seed, shift=0.0, policy=POLICY):
    return predicted(record_of(samples, seed, shift), policy)[:2]


def p_values(ranks, values, rng):
    cuts = range(CHUNK, len(values), CHUNK)
    return np.concatenate([ranks.p_values(v, rng.random((len(v), 2))) for v in np.split(values, cuts)])


def in_threads(update, threads=6, batches=100):
    """Call `update` with 20 samples at a time in threads that start together."""
    gate = threading.Barrier(threads)

    def work(thread):
        gate.wait()
        for n in range(batches):
            update(np.random.default_rng(1000 * thread + n).integers(0, 500, 20))

    every = [threading.Thread(target=work, args=(k,)) for k in range(threads)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads then switch within an update
    try:
        for thread in every:
            thread.start()
        for thread in every:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    return threads * batches * 20


def chosen(record):
    outcome = Outcome(1, 1.0, (0.0, 1.0), 1.0, (0.4, 0.3, 0.3), (1.0, 1.0, 1.0))
    return Choice(POLICY, {"max_drop": 0.1}, outcome, record.digest, network=record.network)
