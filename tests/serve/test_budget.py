"""Moving thresholds under load: they follow the cost, and no sample leaves past the policy with the promise."""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from branchynet import ExitCost, ExitRecord, Policy, choose, load
from branchynet.serve.presets import write_presets
from helpers.serving import POLICY, call, infer, pictures, running

COST = ExitCost((10.0, 20.0, 30.0), (1.0, 1.0, 0.0))  # a sample takes 11, 32 or 62 us
GOAL = 45.0  # with any bound, some inputs cost more and others less
ROWS = 64
CAREFUL = Policy("entropy", (0.1, 0.2))
BOUNDS = {
    "of the promise": None,
    "below the file's": tuple(t / 2 for t in POLICY.thresholds),
    "between": (POLICY.thresholds[0] / 2, 1.3),
    "never at exit 1": (None, 1.2),
}


def scores_of(engine, x):
    """The scores `(S, 3)` at all exits, by thresholds that let every sample leave there."""
    return np.stack([engine(x, thresholds=t).score for t in ([9.0, 9.0], [None, 9.0], [None, None])], axis=1)


@pytest.fixture(scope="module")
def made(models):
    """Samples, their scores, and a choice with a promise."""
    x = pictures(4000)
    scores = scores_of(load(models / "adaptive.onnx", threads=1), x)
    losses = (np.random.default_rng(0).random(scores.shape) < [0.3, 0.2, 0.1]).astype(float)
    record = ExitRecord.from_scores(scores, losses, "entropy")
    choice = choose(record, COST, max_drop=0.1)
    assert choice.promise is not None and None not in choice.policy.thresholds[:-1]
    return x, scores, record, choice


def run_folder(models, path, kind, made, bound):
    """A run with stages, or with a file; returns its bound."""
    _, _, record, choice = made
    if kind == "staged":
        shutil.copytree(models / "staged", path)
    else:
        path.mkdir()
        shutil.copy(models / f"{kind}.onnx", path / "model.onnx")
    if bound is not None:
        choice = replace(choice, policy=Policy("entropy", bound))
    write_presets(path / "policies.json", {"fast": choice, "careful": CAREFUL, "own": Policy("entropy", (1.3, 1.3))})
    record.save(path / "record.npz")
    COST.save(path / "cost.json")
    return choice.policy.thresholds


class Load:
    """Clients of a server; every answer without thresholds of its own is compared with the bound."""

    def __init__(self, port, bound):
        self.port, self.bound = port, bound

    def send(self, x, requests, parameters=None):
        """Send these samples in requests of several clients at once; returns the exits of all answers."""

        def one(n):
            found = infer(self.port, "net", np.roll(x, n, axis=0)[:ROWS], parameters)
            if parameters is None:
                self.check(found["exit"], found["score"])
            return found["exit"]

        with ThreadPoolExecutor(4) as pool:
            return np.concatenate(list(pool.map(one, range(requests))))

    def check(self, exits, scores):
        for n, limit in enumerate(self.bound, 1):
            left = scores[exits == n]
            assert not len(left) if limit is None else (left < np.float32(limit)).all()

    def thresholds(self):
        """The thresholds now, from the metrics, after a request that must not move them.

        The worker has then counted all answers before it.
        """
        infer(self.port, "net", pictures(1), {"policy": "careful"})
        page = call(self.port, "GET", "/metrics")[2].decode()
        found = {int(n): float(t) for n, t in re.findall(r"^branchynet_threshold_(\d)\S* (\S+)", page, re.MULTILINE)}
        return tuple(found.get(n) for n in (1, 2))

    def until(self, x, condition):
        """Send samples until the thresholds are so."""
        for _ in range(40):
            if condition(self.thresholds()):
                return
            self.send(x, 12)
        raise AssertionError(self.thresholds())


@pytest.mark.parametrize(
    ("kind", "bound"),
    [
        *(("staged", one) for one in BOUNDS),
        *(("adaptive", one) for one in BOUNDS),
        ("nested", "between"),
    ],
)
def test_under_load_thresholds_move_and_never_pass_what_the_promise_tested(models, tmp_path, made, kind, bound):
    x, scores, _, _ = made
    bound = run_folder(models, tmp_path / "net", kind, made, BOUNDS[bound])
    engine = load(tmp_path / "net" if kind == "staged" else tmp_path / "net" / "model.onnx", threads=1)
    easy = x[np.argsort(scores[:, :2].max(axis=1))[:200]]
    hard = x[np.argsort(-scores[:, :2].min(axis=1))[:200]]
    with running(tmp_path / "net", budget_us=GOAL, budget_limit="fast", queue=4096, queue_ms=1e5) as port:
        load_ = Load(port, bound)
        assert all(a == b or a < b for a, b in zip(load_.thresholds(), bound, strict=True))
        load_.until(hard, lambda now: now == bound)  # too dear: they move up to the bound, and no further
        load_.send(hard, 12)
        assert load_.thresholds() == bound

        def tighter(now):
            return all(a is None if b is None else a < b for a, b in zip(now, bound, strict=True))

        load_.until(easy, tighter)  # cheap: they move back
        before = load_.thresholds()
        for parameters, given in (
            ({"thresholds": [1.3, 1.3]}, [1.3, 1.3]),
            ({"policy": "own"}, [1.3, 1.3]),
            ({"policy": "careful"}, list(CAREFUL.thresholds)),
        ):
            exits = load_.send(x[:ROWS], 12, parameters)
            wanted = engine(x[:ROWS], thresholds=given).exit
            assert (exits.reshape(12, ROWS) == [np.roll(wanted, n) for n in range(12)]).all()
            assert load_.thresholds() == before  # the controller counts only what it moves
