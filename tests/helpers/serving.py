"""Models to serve, a server in a thread, and raw calls to it."""

import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import nn

from branchynet import BranchyNet, Policy, export
from branchynet.serve.server import prepared
from branchynet.serve.settings import ServeSettings
from helpers.networks import spread_out

LABELS = ["ant", "bee", "cat", "dog"]
POLICY = Policy("entropy", (0.7, 0.9))


def network(width=16):
    """Three exits on images (1, 6, 6)."""
    torch.manual_seed(0)
    trunk = nn.Sequential(
        nn.Flatten(), nn.Linear(36, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
    )
    net = BranchyNet(trunk, {"1": nn.Linear(width, 4), "3": nn.Linear(width, 4)}).eval()
    spread_out(net, (torch.randn(64, 1, 6, 6),))
    return net


def pictures(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 1, 6, 6)).astype(np.float32)


def write_models(folder):
    """A staged, a nested and an adaptive model, and two of another tool."""
    net, example = network(), torch.from_numpy(pictures(2))
    about = {"policy": POLICY, "example": example, "labels": LABELS, "preprocessing": {"mean": [0.5], "std": [0.25]}}
    export(net, folder / "staged", layout="stages", **about)
    export(net, folder / "nested.onnx", **about)
    export(net, folder / "adaptive.onnx", thresholds="input", **about)
    other_model(folder / "other.onnx", ("N", 3))
    other_model(folder / "fixed.onnx", (2, 3))
    return folder


def other_model(path, shape):
    """A file that this project did not write: y = 2 x, z = x > 0."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    z = helper.make_tensor_value_info("z", TensorProto.BOOL, shape)
    constants = [
        helper.make_tensor("two", TensorProto.FLOAT, [], [2.0]),
        helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
    ]
    nodes = [helper.make_node("Mul", ["x", "two"], ["y"]), helper.make_node("Greater", ["x", "zero"], ["z"])]
    graph = helper.make_graph(nodes, "doubled", [x], [y, z], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


@contextlib.contextmanager
def running(path, start=None, **settings):
    """Serve on a free port of the loopback interface; yields the port. The server has stopped afterwards."""
    server, listener = prepared(path, ServeSettings(**{"port": 0, "drain_s": 5.0, **settings}), start)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


def same(found, wanted):
    """Assert that outputs by name are those of an engine."""
    assert found.keys() == {"label", "exit", "score", "output"}
    np.testing.assert_array_equal(found["label"], wanted.label)
    np.testing.assert_array_equal(found["exit"], wanted.exit)
    for name in ("score", "output"):  # the runtime sums in another order for other batch sizes
        np.testing.assert_allclose(found[name], getattr(wanted, name), rtol=1e-5, atol=1e-5)


def started(*arguments, files=None):
    """A server in a process of its own, with the lines that it printed, and its port.

    `files` is the limit of open files, soft and hard.
    """
    command = [sys.executable, "-m", "branchynet", "serve", *map(str, arguments)]
    if files is not None:
        limits = f"ulimit -S -n {files[0]} && ulimit -H -n {files[1]}"
        command = ["sh", "-c", f'{limits} && exec "$@"', "sh", *command]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    process.lines = []
    for line in process.stderr:
        process.lines.append(line)
        if found := re.search(r"http://.*:(\d+)$", line.strip()):
            return process, int(found[1])
    raise AssertionError("".join(process.lines))


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def call(port, method, path, body=b"", headers=None, timeout=20):
    """One request on a connection of its own: status, headers, body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def call_json(port, method, path, value=None, headers=None, timeout=20):
    status, _, body = call(port, method, path, b"" if value is None else json.dumps(value).encode(), headers, timeout)
    return status, json.loads(body)


def tensor(x, name="input"):
    """A tensor in JSON."""
    return {"name": name, "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}


def waiting(port):
    """How many samples of the only model are unanswered."""
    page = call(port, "GET", "/metrics")[2].decode()
    return float(re.search(r"^branchynet_waiting_samples\S* (\S+)", page, re.MULTILINE)[1])


def infer(port, model, x, parameters=None, name="input"):
    """The outputs of a request in JSON, as arrays by name; or the status and the error."""
    request = {"inputs": [tensor(x, name)]}
    if parameters:
        request["parameters"] = parameters
    status, answer = call_json(port, "POST", f"/v2/models/{model}/infer", request)
    if status != 200:
        return status, answer["error"]
    return {one["name"]: np.array(one["data"]).reshape(one["shape"]) for one in answer["outputs"]}


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=20)
