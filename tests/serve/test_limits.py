"""What a server refuses, and what it does under load, with slow clients, and when it stops."""

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from branchynet import load
from branchynet.serve import backends, runner
from helpers.serving import (
    call,
    call_json,
    connect,
    infer,
    pictures,
    running,
    started,
    tensor,
    until,
    waiting,
)

KEY = "0123456789abcdef"


@pytest.fixture
def gate(monkeypatch):
    """Stages run while it is open; it starts open, and every batch first appends its size to `gate.batches`."""
    gate, run = threading.Event(), backends.StagedBackend.run
    gate.set()
    gate.batches = []

    def held(self, stage, block, kind):
        gate.batches.append((stage, len(block[backends.THRESHOLDS])))
        assert gate.wait(20)
        return run(self, stage, block, kind)

    monkeypatch.setattr(backends.StagedBackend, "run", held)
    monkeypatch.setattr(runner, "_INLINE", -1.0)  # in the thread, so that the event loop goes on
    yield gate
    gate.set()


def test_a_full_queue_answers_429_and_keeps_what_it_accepted(folder, gate):
    x, wanted = pictures(30), load(folder / "staged")(pictures(30))
    with running(folder / "staged", queue=10) as port, ThreadPoolExecutor(30) as pool:
        gate.clear()
        first = [pool.submit(infer, port, "staged", x[n : n + 1]) for n in range(10)]
        until(lambda: waiting(port) == 10)
        for n in range(3):
            request = json.dumps({"inputs": [tensor(x[:1])]}).encode()
            status, headers, body = call(port, "POST", "/v2/models/staged/infer", request)
            assert status == 429 and int(headers["Retry-After"]) >= 1, n
            assert "the queue is full: 10 of at most 10 samples wait" in json.loads(body)["error"]
        assert infer(port, "staged", x[:11])[0] == 400  # it would never fit
        gate.set()
        for n, one in enumerate(first):
            found = one.result()
            assert found["label"] == wanted.label[n] and found["exit"] == wanted.exit[n]
        assert waiting(port) == 0 and infer(port, "staged", x[:1])["exit"] == wanted.exit[0]


def test_samples_of_several_requests_share_batches(folder, gate):
    x = pictures(9)
    with running(folder / "staged", max_batch=4) as port, ThreadPoolExecutor(9) as pool:
        del gate.batches[:]
        gate.clear()
        first = [pool.submit(infer, port, "staged", x[n : n + 1], {"thresholds": [None, None]}) for n in range(9)]
        until(lambda: waiting(port) == 9)
        gate.set()
        for one in first:
            assert one.result()["exit"] == 3
    sizes = {stage: [size for n, size in gate.batches if n == stage] for stage in range(3)}
    assert [sum(found) for found in sizes.values()] == [9, 9, 9]
    assert max(map(max, sizes.values())) == 4 and len(sizes[0]) == 3  # 1 while the others came, then 4 and 4


def test_a_deadline_gives_the_answer_of_the_last_exit_so_far_and_says_so(folder, gate, monkeypatch):
    """Stage 1 runs in time and stage 2 does not."""
    x, run = pictures(1), backends.StagedBackend.run

    def slow(self, stage, block, kind):
        if stage == 1:
            time.sleep(0.4)
        return run(self, stage, block, kind)

    engine = load(folder / "staged")
    with running(folder / "staged") as port:
        monkeypatch.setattr(backends.StagedBackend, "run", slow)
        value = {"inputs": [tensor(x)], "parameters": {"thresholds": [None, None], "deadline_ms": 300}}
        status, answer = call_json(port, "POST", "/v2/models/staged/infer", value)
    assert status == 200 and answer["parameters"] == {"unfinished": 1}
    outputs = {one["name"]: one["data"] for one in answer["outputs"]}
    assert outputs["exit"] == [2]  # the stage that ran over the deadline still counts
    np.testing.assert_allclose(outputs["output"], engine(x, thresholds=[None, 99.0]).output[0], rtol=1e-5, atol=1e-5)


def test_a_deadline_without_any_answer_is_an_error(folder, gate):
    with running(folder / "staged") as port, ThreadPoolExecutor(2) as pool:
        gate.clear()
        first = pool.submit(infer, port, "staged", pictures(1))
        until(lambda: waiting(port) == 1)
        second = pool.submit(infer, port, "staged", pictures(1), {"deadline_ms": 50})
        until(lambda: waiting(port) == 2)
        time.sleep(0.1)
        gate.set()
        assert first.result()["exit"] in (1, 2, 3)
        status, error = second.result()
        assert status == 422 and "and 1 of 1 samples had reached no exit" in error


@pytest.mark.parametrize("own", [{}, {"deadline_ms": 60_000}])
def test_only_a_deadline_of_the_server_is_its_fault(folder, gate, own):
    with running(folder / "staged", timeout_s=0.2) as port, ThreadPoolExecutor(2) as pool:
        gate.clear()
        first = pool.submit(infer, port, "staged", pictures(1))
        until(lambda: waiting(port) == 1)
        second = pool.submit(infer, port, "staged", pictures(1), own)
        until(lambda: waiting(port) == 2)
        time.sleep(0.3)
        gate.set()
        assert first.result()["exit"] in (1, 2, 3)
        status, error = second.result()
        assert status == 504 and "and 1 of 1 samples had reached no exit" in error


def test_a_request_whose_client_has_gone_leaves_the_queue(folder, gate):
    with running(folder / "staged") as port, ThreadPoolExecutor(2) as pool:
        gate.clear()
        first = pool.submit(infer, port, "staged", pictures(1))
        until(lambda: waiting(port) == 1)
        body = json.dumps({"inputs": [tensor(pictures(5))]}).encode()
        gone = connect(port)
        gone.sendall(
            b"POST /v2/models/staged/infer HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        until(lambda: waiting(port) == 6)
        gone.close()
        until(lambda: waiting(port) == 1)
        gate.set()
        assert first.result()["exit"] in (1, 2, 3)


def test_bodies_are_limited_before_they_are_read(folder):
    with running(folder / "staged", max_body=1000) as port:
        status, error = infer(port, "staged", pictures(30))
        assert status == 413 and re.search(r"the body has \d+ bytes; the server takes 1000", error)
        with connect(port) as client:  # chunked, so nothing declares its size
            client.sendall(b"POST /v2/models/staged/infer HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
            with contextlib.suppress(OSError):
                for _ in range(10):
                    client.sendall(b"200\r\n" + 512 * b"x" + b"\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 413 ")
        status, _, body = call(port, "POST", "/v2/models/staged/infer", b"x", {"Content-Encoding": "gzip"})
        assert status == 415 and "send it without compression" in json.loads(body)["error"]
        assert infer(port, "staged", pictures(1)).keys() >= {"exit"}


def test_the_key_is_needed_everywhere_but_by_probes(folder, tmp_path):
    (tmp_path / "key").write_text(f"{KEY}\n")
    with running(folder / "staged", api_key_file=str(tmp_path / "key")) as port:
        for path in ("/v2", "/v2/models/staged", "/metrics", "/models/staged"):
            assert call(port, "GET", path)[0] == 401
            assert call(port, "GET", path, headers={"Authorization": f"Bearer {KEY}x"})[0] == 401
            assert call(port, "GET", path, headers={"Authorization": f"Bearer {KEY}"})[0] == 200
            assert call(port, "GET", path, headers={"X-API-Key": KEY})[0] == 200
        status, error = infer(port, "staged", pictures(1))
        assert status == 401 and error == "the request has no valid API key; send it as 'Authorization: Bearer KEY'"
        assert call(port, "GET", "/v2/health/live")[0] == call(port, "GET", "/v2/health/ready")[0] == 200


def test_clients_may_not_manage_models_unless_it_is_allowed(folder):
    with running(folder / "staged") as port:
        status, answer = call_json(port, "POST", "/v2/repository/models/staged/unload")
        assert status == 401 and "--manage" in answer["error"]
        assert infer(port, "staged", pictures(1)).keys() >= {"exit"}


def test_models_are_loaded_again_under_load_without_a_gap(folder):
    x, wanted = pictures(40), load(folder / "staged")(pictures(40)).exit
    with running(folder / "staged", manage=True) as port, ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(infer, port, "staged", x[n % 40 : n % 40 + 1]) for n in range(240)]
        for _ in range(4):
            assert call(port, "POST", "/v2/repository/models/staged/load")[0] == 200
        assert [one.result()["exit"] for one in asked] == [wanted[n % 40] for n in range(240)]


def test_routes_that_are_not_there_are_said(folder):
    with running(folder / "staged") as port:
        for method, path, wanted in (("GET", "/v3", 404), ("GET", "/v2/models", 404), ("GET", "/predict", 405)):
            status, answer = call_json(port, method, path)
            assert status == wanted and "GET /openapi.json lists all routes" in answer["error"]


def test_a_fault_of_the_server_is_logged_and_answered(folder, monkeypatch, caplog):
    monkeypatch.setattr("branchynet.serve.app.read_infer", lambda *_: 1 / 0)
    with running(folder / "staged") as port:
        status, error = infer(port, "staged", pictures(1))
        assert status == 500 and error == "the server failed on this request; its log says why"
    assert "ZeroDivisionError" in caplog.text and "POST /v2/models/staged/infer failed" in caplog.text


def test_a_request_that_the_runtime_refuses_fails_alone(folder, gate, monkeypatch):
    run = backends.StagedBackend.run

    def fussy(self, stage, block, kind):
        if stage == 0 and (block["input"] > 90).any():
            raise RuntimeError("no such number")
        return run(self, stage, block, kind)

    with running(folder / "staged") as port, ThreadPoolExecutor(4) as pool:
        monkeypatch.setattr(backends.StagedBackend, "run", fussy)
        gate.clear()
        rows = [pictures(1), pictures(1), 99 + pictures(1), pictures(1)]
        asked = [pool.submit(infer, port, "staged", x) for x in rows]
        until(lambda: waiting(port) == 4)
        gate.set()
        found = [one.result() for one in asked]
    assert found[2] == (500, "the runtime cannot compute this request (no such number); send other values")
    assert all(found[n]["exit"] in (1, 2, 3) for n in (0, 1, 3))


def test_a_signal_under_load_loses_nothing_that_was_accepted(folder):
    """Clients send on connections that they keep. After the signal, each gets its answer, or a closed connection."""
    x = pictures(64)
    wanted = load(folder / "staged")(x)
    process, port = started(folder / "staged", "--port", 0)
    answered, lost, stop = [], [], threading.Event()

    def client(start):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        for turn in range(100_000):
            n = (start + turn) % 64
            body = json.dumps({"inputs": [tensor(x[n : n + 1])]})
            try:
                connection.request("POST", "/v2/models/staged/infer", body)
                answer = connection.getresponse()
                found = json.loads(answer.read())
            except (ConnectionError, http.client.RemoteDisconnected) as error:
                if not stop.is_set():
                    lost.append(error)
                return
            exit = found["outputs"][1]["data"][0] if answer.status == 200 else answer.status
            (answered if exit == wanted.exit[n] else lost).append(exit)

    threads = [threading.Thread(target=client, args=(8 * n,)) for n in range(8)]
    try:
        for one in threads:
            one.start()
        until(lambda: len(answered) > 100)
        stop.set()
        process.send_signal(signal.SIGTERM)
        for one in threads:
            one.join(30)
        assert process.wait(30) == 0, process.stderr.read()
    finally:
        process.kill()
        process.stderr.close()
    assert lost == [] and len(answered) > 100


def test_requests_that_wait_when_the_server_stops_are_answered(folder, gate):
    x, wanted = pictures(8), load(folder / "staged")(pictures(8))
    with ThreadPoolExecutor(8) as pool:
        with running(folder / "staged") as port:
            gate.clear()
            first = [pool.submit(infer, port, "staged", x[n : n + 1]) for n in range(8)]
            until(lambda: waiting(port) == 8)
            threading.Timer(0.5, gate.set).start()
        for n, one in enumerate(first):
            assert one.result()["exit"] == wanted.exit[n]


def test_a_server_that_cannot_start_says_why(folder, tmp_path):
    def failed(*arguments):
        command = [sys.executable, "-m", "branchynet", "serve", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        return done.stderr

    with socket.create_server(("127.0.0.1", 0)) as taken:
        message = failed(folder / "staged", "--port", taken.getsockname()[1])
        assert "cannot serve at 127.0.0.1:" in message and "give another --port" in message
    (tmp_path / "serve.toml").write_text("que = 7\n")
    assert "'que', which is unknown; did you mean 'queue'?" in failed(folder, "--config", tmp_path / "serve.toml")
