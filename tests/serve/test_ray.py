"""A Ray cluster of two local nodes answers as the engine does, also while replicas and nodes die."""

import itertools
import os
import random
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ray import serve

from branchynet import Policy, load
from branchynet.serve import ray_app
from branchynet.serve.cluster import connected
from branchynet.serve.presets import write_presets
from branchynet.serve.server import listen
from branchynet.serve.settings import ServeSettings
from helpers.ray_cluster import NODE, kill, local_cluster, node_of, replicas
from helpers.serving import call_json, infer, pictures, running, same, write_models

pytestmark = pytest.mark.heavy
OURS = {"staged": "staged", "nested": "nested.onnx", "adaptive": "adaptive.onnx"}
FAST = Policy("entropy", (1.1, 1.2))
THRESHOLDS = [None, [0.1, 1.3], [1.2, None], [None, None]]
SETTINGS = {"max_batch": 8, "cpus": 0.01, "timeout_s": 600.0}  # slow machines take long to start a replica
WAITING = {**SETTINGS, "max_wait_ms": 100.0}  # so that replicas have requests when they die


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = write_models(tmp_path_factory.mktemp("repository"))
    write_presets(path / "staged" / "policies.json", {"fast": FAST})
    return path


@pytest.fixture(scope="module")
def cluster():
    with local_cluster(2) as found:
        yield found


@pytest.fixture(scope="module")
def started(cluster):
    with connected(ServeSettings(**SETTINGS)) as start:
        yield start


@pytest.fixture(scope="module")
def port(folder, started):
    with running(folder, started, manage=True, **SETTINGS) as found:
        yield found


@pytest.mark.parametrize("model", OURS)
def test_answers_of_a_cluster_are_those_of_the_engine(folder, port, model):
    engine = load(folder / OURS[model], threads=1)
    for count, thresholds in itertools.product([1, 7, 30], THRESHOLDS):
        x, parameters = pictures(count, seed=count), {"thresholds": thresholds} if thresholds else None
        same(infer(port, model, x, parameters), engine(x, thresholds=thresholds))


def test_presets_errors_and_other_files_are_those_of_a_server(folder, port):
    x = pictures(20)
    same(infer(port, "staged", x, {"policy": "fast"}), load(folder / "staged")(x, thresholds=FAST.thresholds))
    for model, array, parameters, message in [
        ("staged", x[:, :, :3], None, "input"),
        ("staged", x, {"policy": "fats"}, "no policy 'fats'"),
        ("staged", x, {"thresholds": [0.1]}, "thresholds"),
        ("other", x, None, "input"),
    ]:
        status, error = infer(port, model, array, parameters)
        assert status == 400 and message in error
    assert infer(port, "none", x)[0] == 404
    y = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(infer(port, "other", y, name="x")["y"], 2 * y)
    np.testing.assert_array_equal(infer(port, "fixed", y, name="x")["y"], 2 * y)


def test_a_model_is_unloaded_and_loaded_again(folder, port):
    assert call_json(port, "POST", "/v2/repository/models/nested/unload", timeout=700)[0] == 200
    assert infer(port, "nested", pictures(2))[0] == 503
    assert call_json(port, "POST", "/v2/repository/models/nested/load", timeout=700)[0] == 200
    same(infer(port, "nested", pictures(2)), load(folder / "nested.onnx", threads=1)(pictures(2)))


def ask_while(port, path, harm, requests=300, every=60):
    """Send requests from eight clients, and call `harm` after every so many answers. All answers must be right."""
    engine, x, url = load(path, threads=1), pictures(60), f"/v2/models/{path.name}/infer"
    answered, lock = itertools.count(1), threading.Lock()

    def one(n):
        rows, thresholds = x[7 * n % 50 :][: 1 + n % 5], THRESHOLDS[n % len(THRESHOLDS)]
        given = {"name": "input", "shape": [*rows.shape], "datatype": "FP32", "data": rows.ravel().tolist()}
        request = {"inputs": [given], "parameters": {"thresholds": thresholds} if thresholds else {}}
        status, answer = call_json(port, "POST", url, request, timeout=700)
        assert status == 200, answer
        found = {one["name"]: np.array(one["data"]).reshape(one["shape"]) for one in answer["outputs"]}
        same(found, engine(rows, thresholds=thresholds))
        with lock:
            if next(answered) % every == 0:
                harm()
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(one, range(requests))) == requests


def test_killed_replicas_lose_no_request(folder, cluster, tmp_path):
    path = shutil.copytree(folder / "staged", tmp_path / "mortal")
    chance, killed = random.Random(0), []

    def harm():
        killed.append(chance.choice(replicas("mortal-stage-")))
        kill(killed[-1])

    with connected(ServeSettings(**WAITING)) as start, running(path, start, **WAITING) as port:
        ask_while(port, path, harm)
    assert len({*killed}) == 5


def test_the_command_serves_on_a_cluster_until_a_signal(folder, cluster):
    command = [
        sys.executable,
        "-m",
        "branchynet",
        "serve",
        folder / "adaptive.onnx",
        "--ray",
        "--port",
        "0",
        "--cpus",
        "0.01",
    ]
    environ = {**os.environ, "RAY_ADDRESS": cluster.address}
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, env=environ) as process:
        try:
            line = next(line for line in process.stderr if line.startswith("serving adaptive at "))
            port = int(line.rpartition(":")[2])
            same(infer(port, "adaptive", pictures(9)), load(folder / "adaptive.onnx", threads=1)(pictures(9)))
            process.terminate()
            process.communicate(timeout=300)
            assert process.returncode == 0
        finally:
            process.kill()


def test_a_lost_node_loses_no_request(folder, cluster, tmp_path):
    path = shutil.copytree(folder / "staged", tmp_path / "nodal")
    settings = {**WAITING, "min_replicas": 2, "cpus": 0.25}
    with connected(ServeSettings(**settings)) as start, running(path, start, **settings) as port:
        (worker,) = cluster.worker_nodes
        assert worker.node_id in {node_of(name) for name in replicas("nodal-stage-")}
        ask_while(port, path, lambda: cluster.remove_node(worker, allow_graceful=False), requests=120, every=70)
    cluster.add_node(**NODE)


def test_an_application_behind_the_proxies_of_ray_answers_alike(folder, cluster):
    serve.shutdown()
    listener = listen(ServeSettings(port=0))
    port = listener.getsockname()[1]
    listener.close()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(ray_app(folder, ServeSettings(**WAITING)))
    for model in OURS:
        same(infer(port, model, pictures(30)), load(folder / OURS[model], threads=1)(pictures(30)))
    status, error = infer(port, "staged", pictures(2)[:, :, :3])
    assert status == 400 and "input" in error
    assert call_json(port, "GET", "/models/staged")[1]["policies"].keys() == {"fast"}
    ask_while(port, folder / "staged", lambda: kill(replicas("staged-stage-")[0]), requests=120)
