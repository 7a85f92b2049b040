"""Samples go from stage to stage as on a Ray cluster, in one process, with replicas that fail."""

import asyncio
import itertools

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from branchynet import load
from branchynet.errors import FileError, InputError
from branchynet.serve import ray_app
from branchynet.serve.backends import open_backend
from branchynet.serve.cluster import connected
from branchynet.serve.cluster_runner import ClusterRunner
from branchynet.serve.faults import DeadlineError, QueueFull, StoppedError
from branchynet.serve.server import listen
from branchynet.serve.settings import ServeSettings
from branchynet.serve.stage_replica import StageReplica
from helpers.serving import pictures, same, write_models

OURS = {"staged": "staged", "nested": "nested.onnx", "adaptive": "adaptive.onnx"}
THRESHOLDS = [None, [0.1, 1.3], [1.2, None], [None, None]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("repository"))


class Here:
    """A handle to a replica in this process, which fails now and then."""

    def __init__(self, path, stage, failures=(), **settings):
        self._replica = StageReplica(str(path), stage, ServeSettings(**{"max_batch": 4, **settings}))
        self._failures = iter(failures)
        self.calls = 0
        self.run = self

    def remote(self, call, timeout):
        self.calls += 1
        return Response(self._answer(call, timeout))

    async def _answer(self, call, timeout):
        failure = next(self._failures, None)
        if isinstance(failure, BaseException):
            raise failure
        found = await (asyncio.sleep(60) if failure == "hang" else self._replica.run(call, timeout))
        if failure == "late":  # it ran, and died before the answer arrived
            raise ActorDiedError
        return found


class Response:
    def __init__(self, answer):
        self._answer, self.cancelled = answer, False

    def __await__(self):
        return self._answer.__await__()

    def cancel(self):
        self.cancelled = True


def stages(path, failures=((), (), ()), **settings):
    count = len(open_backend(path, 1).exits)
    return [Here(path, n, failures[n], **settings) for n in range(count)]


@pytest.mark.parametrize("model", OURS)
def test_stages_one_by_one_answer_as_the_engine(folder, model):
    path = folder / OURS[model]
    backend, engine, runner = open_backend(path, 1), load(path, threads=1), ClusterRunner(stages(path), bound=4096)
    x, cases = pictures(60), list(itertools.product(range(20), [1, 3, 11], THRESHOLDS))

    async def one(start, count, thresholds):
        rows = x[start : start + count]
        answer = await runner.answer(backend.call({"input": rows}, thresholds), 60)
        same(answer.outputs, engine(rows, thresholds=thresholds))
        assert answer.unfinished == 0 and len(answer.steps) >= 1

    async def all():
        await asyncio.gather(*(one(*case) for case in cases))

    asyncio.run(all())
    assert runner.waiting == 0


def test_samples_with_thresholds_each_share_a_request(folder):
    backend, engine = open_backend(folder / "staged", 1), load(folder / "staged", threads=1)
    x, limits = pictures(30), np.linspace(0, 1.4, 30).astype(np.float32)
    thresholds = [limits, limits[::-1]]
    answer = asyncio.run(ClusterRunner(stages(folder / "staged")).answer(backend.call({"input": x}, thresholds), 60))
    same(answer.outputs, engine(x, thresholds=thresholds))
    assert {*answer.outputs["exit"]} == {1, 2, 3}


def test_a_request_whose_replica_dies_runs_again_and_is_answered_once(folder):
    died = [ActorDiedError(), "late", ActorUnavailableError("gone", None)]
    handles = stages(folder / "staged", [died, [None, *died], [*died, None, "late"]])
    backend, engine, runner = open_backend(folder / "staged", 1), load(folder / "staged", threads=1), None
    answered = []

    class Observer:
        def answered(self, outputs, seconds, default):
            answered.append(len(outputs["exit"]))

    runner = ClusterRunner(handles, observer=Observer())
    x = pictures(24)

    async def one(n):
        rows = x[4 * n : 4 * n + 4]
        answer = await runner.answer(backend.call({"input": rows}, [None, None]), 60)
        same(answer.outputs, engine(rows, thresholds=[None, None]))

    async def all():
        await asyncio.gather(*map(one, range(6)))

    asyncio.run(all())
    assert answered == [4] * 6 and [one.calls for one in handles] == [6 + 3, 6 + 3, 6 + 4]


def test_a_deadline_gives_the_answers_of_the_exits_that_were_reached(folder):
    backend, engine = open_backend(folder / "staged", 1), load(folder / "staged", threads=1)
    x = pictures(30)
    runner = ClusterRunner(stages(folder / "staged", [[], ["hang"], []]))
    answer = asyncio.run(runner.answer(backend.call({"input": x}, [0.7, None]), 0.2))
    wanted = engine(x, thresholds=[float("inf"), None])
    same(answer.outputs, wanted)
    assert answer.unfinished == (engine(x, thresholds=[0.7, None]).exit > 1).sum() > 0
    runner = ClusterRunner(stages(folder / "staged", [["hang"], [], []]))
    with pytest.raises(DeadlineError, match="30 of 30 samples had reached no exit"):
        asyncio.run(runner.answer(backend.call({"input": x}, None), 0.2))
    assert runner.waiting == 0


def test_room_and_the_end_are_those_of_the_runner(folder):
    backend = open_backend(folder / "staged", 1)
    ended, handles = [], stages(folder / "staged", [["hang"], [], []])
    runner = ClusterRunner(handles, bound=4, drain_s=0.01, ended=lambda: ended.append(1))

    async def ask():
        waiting = asyncio.ensure_future(runner.answer(backend.call({"input": pictures(3)}, None), 60))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="the queue is full: 3 of at most 4 samples"):
            await runner.answer(backend.call({"input": pictures(2)}, None), 60)
        with pytest.raises(InputError, match="a request must have 1 to 4 samples"):
            await runner.answer(backend.call({"input": pictures(5)}, None), 60)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert runner.waiting == 0
        runner.stop()
        with pytest.raises(StoppedError):
            await runner.answer(backend.call({"input": pictures(1)}, None), 60)

    asyncio.run(ask())
    assert ended == [1]


@pytest.mark.parametrize("given", [{"grpc_port": 0}, {"manage": True}, {"certificate": "a", "private_key": "b"}])
def test_an_application_refuses_what_needs_a_server_of_its_own(folder, given):
    with pytest.raises(InputError, match=f"ray_app takes no {next(iter(given))}"):
        ray_app(folder / "staged", ServeSettings(**given))


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "127.0.0.1:70000", "no address"])
def test_a_cluster_that_cannot_be_reached_is_told(monkeypatch, address):
    listener = listen(ServeSettings(port=0))
    monkeypatch.setenv("RAY_ADDRESS", address.format(listener.getsockname()[1]))
    listener.close()
    with pytest.raises(InputError, match=r"cannot connect to a Ray cluster .* correct RAY_ADDRESS"):
        connected(ServeSettings()).__enter__()


def test_an_application_of_damaged_files_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(FileError, match="can be served"):
        ray_app(tmp_path)


def test_replicas_and_cpus_are_checked():
    for given, message in [
        ({"min_replicas": 0}, "min_replicas must be at least 1; got 0"),
        ({"min_replicas": 5}, "max_replicas=4 is less than min_replicas=5"),
        ({"cpus": 0.0}, "cpus must be"),
        ({"cpus": 2.0, "threads": 3}, "threads=3 is more than cpus=2"),
    ]:
        with pytest.raises(InputError, match=message):
            ServeSettings(**given)
