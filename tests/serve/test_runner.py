"""The worker of a model: requests of several event loops, cancelled ones, and what happens when it stops."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from branchynet import load
from branchynet.serve import runner as module
from branchynet.serve.backends import open_backend, warmed
from branchynet.serve.faults import StoppedError
from branchynet.serve.runner import Runner
from branchynet.serve.tickets import stage_limits
from helpers.serving import pictures


@pytest.fixture(params=["in the loop", "in the thread"])
def where(request, monkeypatch):
    monkeypatch.setattr(module, "_INLINE", 60.0 if request.param == "in the loop" else -1.0)


@pytest.fixture(params=["staged", "nested.onnx"])
def started(request, folder, where):
    backend = open_backend(folder / request.param, 1)
    runner = Runner(backend, stage_limits(warmed(backend), 4))
    yield backend, runner, load(folder / request.param, threads=1)
    runner.stop(10)


def test_answers_are_those_of_the_engine_for_requests_of_several_loops(started):
    backend, runner, engine = started
    x = pictures(64)

    async def ask(start):
        async def one(n):
            rows = x[n : n + 1 + n % 3]
            found = await runner.answer(backend.call({"input": rows}, None))
            wanted = engine(rows)
            np.testing.assert_array_equal(found.outputs["exit"], wanted.exit)
            np.testing.assert_allclose(found.outputs["output"], wanted.output, rtol=1e-5, atol=1e-5)

        await asyncio.gather(*(one((start + 7 * n) % 60) for n in range(40)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda start: asyncio.run(ask(start)), range(4)))
    assert runner.waiting == 0


def test_cancelled_requests_are_forgotten(started):
    backend, runner, _ = started
    call = backend.call({"input": pictures(3)}, None)

    async def ask():
        tasks = [asyncio.ensure_future(runner.answer(call)) for _ in range(20)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        return [type(one).__name__ for one in found]

    found = asyncio.run(ask())
    assert found[1::2] == ["Answer"] * 10 and {*found[::2]} <= {"CancelledError", "Answer"}
    assert runner.waiting == 0


def test_a_loop_that_ended_does_not_stop_the_others(started):
    backend, runner, engine = started
    call = backend.call({"input": pictures(2)}, None)
    loop = asyncio.new_event_loop()
    task = loop.create_task(runner.answer(call))
    loop.call_soon(loop.stop)  # runs the first step of the task, which queues the request, and no more
    loop.run_forever()
    loop.close()
    task._log_destroy_pending = False
    found = asyncio.run(runner.answer(call))
    np.testing.assert_array_equal(found.outputs["exit"], engine(pictures(2)).exit)
    runner.stop(10)
    assert runner.waiting == 0


def test_a_runner_that_stops_answers_what_it_accepted_and_no_more(started):
    backend, runner, _ = started
    call = backend.call({"input": pictures(1)}, None)

    async def ask():
        accepted = [asyncio.ensure_future(runner.answer(call)) for _ in range(30)]
        await asyncio.sleep(0)
        stopped = asyncio.get_running_loop().run_in_executor(None, runner.stop)
        found = await asyncio.gather(*accepted)
        await stopped
        with pytest.raises(StoppedError, match="send the request again later"):
            await runner.answer(call)
        return found

    assert len(asyncio.run(ask())) == 30
