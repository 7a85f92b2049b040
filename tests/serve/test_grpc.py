"""gRPC against clients that no one here wrote: answers are the engine's, and requests are counted and managed."""

import asyncio
import json

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
from grpc import StatusCode
from tritonclient.utils import InferenceServerException

from branchynet import Policy, load
from branchynet.serve.presets import write_presets
from helpers.grpc_serving import refused, request, running, stub, tensor
from helpers.serving import LABELS, call, pictures

MODELS = ("staged", "nested", "adaptive")
NAMES = ("label", "exit", "score", "output")


@pytest.fixture(scope="module")
def folder(folder):
    (folder / "broken.onnx").write_bytes(b"no model")
    write_presets(folder / "adaptive.policies.json", {"careful": Policy("entropy", (0.1, 0.2))})
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with running(folder) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.grpc.port}") as found:
        yield found


@pytest.fixture(scope="module")
def raw(server):
    with stub(server.grpc.port) as found:
        yield found


def check_equal(result, wanted):
    """Batches of other sizes may use other kernels, so outputs agree up to rounding of float32."""
    for name in NAMES:
        found, right = result.as_numpy(name), getattr(wanted, name)
        assert found.dtype == right.dtype and found.shape == right.shape
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)


def test_the_sync_client_sees_health_metadata_and_states(server, client):
    http = tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.http_port}")
    assert client.is_server_live() and client.is_server_ready()
    assert [client.is_model_ready(name) for name in ("nested", "staged", "broken")] == [True, True, False]
    assert client.is_model_ready("nested", "1")
    assert client.get_server_metadata().name == "branchynet"
    for name in (*MODELS, "other"):
        found = client.get_model_metadata(name, as_json=True)
        for one in (*found["inputs"], *found["outputs"]):
            one["shape"] = [int(n) for n in one["shape"]]  # int64 is text in the JSON of protobuf
        assert found == http.get_model_metadata(name)
    http.close()
    states = {one.name: one.state for one in client.get_model_repository_index().models}
    assert states == {**dict.fromkeys([*MODELS, "other", "fixed"], "READY"), "broken": "UNAVAILABLE"}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("thresholds", [None, "never,never", "0.3,1.1"])
def test_answers_of_the_sync_client_are_those_of_the_engine(folder, client, model, thresholds):
    engine = load(folder / (model if model == "staged" else f"{model}.onnx"), threads=1)
    given = None if thresholds is None else [None if t == "never" else float(t) for t in thresholds.split(",")]
    parameters = {} if thresholds is None else {"thresholds": thresholds}
    exits = set()
    for rows in (1, 7, 80):
        x = pictures(rows, rows)
        wanted = engine(x) if given is None else engine(x, thresholds=given)
        check_equal(client.infer(model, [tensor(x)], parameters=parameters), wanted)
        exits |= set(wanted.exit.tolist())
    assert exits == ({3} if thresholds == "never,never" else {1, 2, 3})


def test_the_async_client_shares_batches_and_gets_its_own_answers(folder, server):
    engine = load(folder / "staged", threads=1)
    batches = [pictures(1 + n % 5, n) for n in range(60)]
    thresholds = [(0.2 + 0.02 * n, 0.5) for n in range(60)]

    async def ask():
        async with tritonclient.grpc.aio.InferenceServerClient(f"127.0.0.1:{server.grpc.port}") as client:
            return await asyncio.gather(
                *(
                    client.infer(
                        "staged", [tensor(x)], parameters={"thresholds": "{},{}".format(*t)}, request_id=str(n)
                    )
                    for n, (x, t) in enumerate(zip(batches, thresholds, strict=True))
                )
            )

    for n, (found, x, t) in enumerate(zip(asyncio.run(ask()), batches, thresholds, strict=True)):
        check_equal(found, engine(x, thresholds=list(t)))
        assert found.get_response().id == str(n)


def test_a_named_policy_counts_and_class_names_come_if_asked_for(folder, client):
    x = pictures(9)
    wanted = load(folder / "adaptive.onnx", threads=1)(x, thresholds=[0.1, 0.2])
    outputs = [tritonclient.grpc.InferRequestedOutput(name) for name in ("class_name", "exit")]
    found = client.infer("adaptive", [tensor(x)], outputs=outputs, parameters={"policy": "careful"})
    assert found.as_numpy("exit").tolist() == wanted.exit.tolist()
    assert [name.decode() for name in found.as_numpy("class_name")] == [LABELS[n] for n in wanted.label]
    assert found.as_numpy("output") is None


def test_typed_contents_are_answered_with_typed_contents(folder, raw):
    x = pictures(3)
    wanted = load(folder / "nested.onnx", threads=1)(x)
    answer = raw.ModelInfer(request("nested", x, raw=False, id="mine"))
    found = {one.name: one for one in answer.outputs}
    assert answer.id == "mine" and not answer.raw_output_contents
    assert list(found["exit"].contents.int64_contents) == wanted.exit.tolist()
    np.testing.assert_allclose(found["output"].contents.fp32_contents, wanted.output.ravel(), rtol=1e-5, atol=1e-6)
    typed = raw.ModelInfer(request("other", np.float32([[1, -1, 0]]), "x", raw=False)).outputs
    assert list(typed[0].contents.fp32_contents) == [2, -2, 0]
    assert list(typed[1].contents.bool_contents) == [True, False, False]


def test_requests_are_counted_with_their_protocol(server, client, raw):
    def counted(status, model="nested"):
        page = call(server.http_port, "GET", "/metrics")[2].decode()
        start = f'branchynet_requests_total{{model="{model}",protocol="grpc",status="{status}"}} '
        return sum(float(line.removeprefix(start)) for line in page.splitlines() if line.startswith(start))

    before = [counted(200), counted(400), counted(404, "")]
    client.infer("nested", [tensor(pictures(1))])
    for model, code in (("nested", StatusCode.INVALID_ARGUMENT), ("none", StatusCode.NOT_FOUND)):
        with refused(code, ""):
            raw.ModelInfer(request(model, pictures(1), name="other"))
    assert [counted(200), counted(400), counted(404, "")] == [n + 1 for n in before]


def test_clients_load_and_unload_only_where_they_may(folder, client, tmp_path):
    with pytest.raises(InferenceServerException, match="start the server with --manage"):
        client.unload_model("nested")
    (tmp_path / "one.onnx").write_bytes((folder / "nested.onnx").read_bytes())
    with (
        running(tmp_path, manage=True) as server,
        tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.grpc.port}") as own,
    ):
        own.unload_model("one")
        assert not own.is_model_ready("one") and not own.is_server_ready()
        assert [one.state for one in own.get_model_repository_index().models] == ["UNAVAILABLE"]
        own.load_model("one")
        assert own.is_model_ready("one")
        with pytest.raises(InferenceServerException, match="'config', which is unknown; leave it out"):
            own.load_model("one", config=json.dumps({}))
        with pytest.raises(InferenceServerException, match="there is no model 'two'"):
            own.load_model("two")
