"""The configuration and the statistics of models, as both clients of Triton read them."""

import time

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from google.protobuf.json_format import ParseDict
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from branchynet import load
from helpers.grpc_serving import running
from helpers.serving import POLICY, infer, pictures


@pytest.fixture(scope="module")
def server(folder):
    with running(folder, max_batch=8, max_wait_ms=1.5, queue=100) as found:
        yield found


@pytest.fixture(scope="module")
def clients(server):
    with (
        tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.http_port}") as http,
        tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.grpc.port}") as grpc,
    ):
        yield http, grpc


@pytest.mark.parametrize("model", ["staged", "nested", "other", "fixed"])
def test_the_configuration_agrees_with_the_metadata_and_between_protocols(clients, model):
    http, grpc = clients
    about, found = http.get_model_metadata(model), http.get_model_config(model)
    batch = [] if found["max_batch_size"] == 0 else [-1]
    assert found["max_batch_size"] == (0 if model == "fixed" else 100)
    for key in ("input", "output"):
        names = {"TYPE_STRING": "BYTES"}
        kinds = [names.get(one["data_type"], one["data_type"].removeprefix("TYPE_")) for one in found[key]]
        shapes = [batch + one["dims"] for one in found[key]]
        wanted = about[f"{key}s"]
        assert [one["name"] for one in found[key]] == [one["name"] for one in wanted]
        assert kinds == [one["datatype"] for one in wanted] and shapes == [one["shape"] for one in wanted]
    assert grpc.get_model_config(model, "1") == ParseDict({"config": found}, service_pb2.ModelConfigResponse())
    if model in ("staged", "nested"):
        assert found["parameters"]["thresholds"]["string_value"] == ",".join(f"{t:g}" for t in POLICY.thresholds)
        assert found["dynamic_batching"] == {"preferred_batch_size": [8], "max_queue_delay_microseconds": 1500}
    for name in ("model_configuration", "statistics"):
        assert name in http.get_server_metadata()["extensions"] and name in grpc.get_server_metadata().extensions


def test_statistics_count_requests_samples_and_batches(folder, server, clients):
    http, grpc = clients
    x, since = pictures(30), time.time()

    def read():
        (found,) = http.get_inference_statistics("staged")["model_stats"]
        assert grpc.get_inference_statistics("staged", "1") == ParseDict(
            {"model_stats": [found]}, service_pb2.ModelStatisticsResponse()
        )
        return found

    assert read()["inference_count"] == read()["last_inference"] == 0
    exits = load(folder / "staged")(x).exit
    start = time.perf_counter()
    for n in range(10):
        infer(server.http_port, "staged", x[3 * n : 3 * n + 3])
    took = time.perf_counter() - start
    assert infer(server.http_port, "staged", x, name="y")[0] == 400
    found = read()
    stats = found["inference_stats"]
    assert stats["success"]["count"] == 10 and stats["fail"]["count"] == 1 and found["inference_count"] == 30
    stages = int(np.maximum.reduceat(exits, range(0, 30, 3)).sum())  # each request runs alone, to its latest exit
    assert found["execution_count"] == stats["compute_infer"]["count"] == stages
    assert 0 < stats["compute_infer"]["ns"] < stats["success"]["ns"] < 1e9 * took
    assert 1e3 * since - 1 <= found["last_inference"] <= 1e3 * time.time()
    whole = http.get_inference_statistics()["model_stats"]
    assert [one["name"] for one in whole] == ["adaptive", "fixed", "nested", "other", "staged"] and whole[-1] == found
    infer(server.http_port, "other", np.ones((4, 3), np.float32), name="x")
    assert http.get_inference_statistics("other")["model_stats"][0]["inference_count"] == 4


def test_unknown_models_have_neither(clients):
    for one in clients:
        for call in (one.get_model_config, one.get_inference_statistics):
            with pytest.raises(InferenceServerException, match="there is no model 'none'"):
                call("none")
            with pytest.raises(InferenceServerException, match="no version '2'"):
                call("nested", "2")
