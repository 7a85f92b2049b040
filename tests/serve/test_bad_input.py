"""Wrong requests over HTTP: each ends in one error that says what is wrong, and the connection serves the next request.

Those over gRPC are in test_grpc_mistakes.py, slow and silent clients in test_connections.py.
"""

import http.client
import json

import numpy as np
import pytest
import torch

from branchynet import Policy, export
from helpers.serving import network, pictures, running, tensor

X = pictures(1)
PATH = "/v2/models/staged/infer"


@pytest.fixture(scope="module")
def port(folder):
    example = torch.from_numpy(pictures(2))
    export(network(), folder / "without_1", policy=Policy("entropy", (None, 0.9)), example=example, layout="stages")
    (folder / "broken.onnx").write_bytes(b"no model")
    with running(folder, max_body=1 << 20) as found:
        yield found


@pytest.fixture
def connection(port):
    found = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    yield found
    found.close()


def ask(connection, path, body, headers=None):
    connection.request("POST", path, body, headers or {})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def request(**changes):
    """The body of a request for one sample, with changes to its tensor."""
    return json.dumps({"inputs": [{**tensor(X), **changes}]}).encode()


def with_parameters(**parameters):
    return json.dumps({"inputs": [tensor(X)], "parameters": parameters}).encode()


def binary(data, size=None, shape=(1, 1, 6, 6)):
    """A body with a tensor in bytes, and its header."""
    about = {"name": "input", "shape": list(shape), "datatype": "FP32"}
    about["parameters"] = {"binary_data_size": len(data) if size is None else size}
    head = json.dumps({"inputs": [about]}).encode()
    return head + data, {"Inference-Header-Content-Length": str(len(head))}


LEFT_OUT = "/v2/models/without_1/infer"
MANY = np.zeros((1025, 1, 6, 6), np.float32)
NAN = np.where(np.arange(36) == 5, np.nan, X.ravel()).astype(np.float32)
WRONG = {
    "malformed JSON": (PATH, request()[:-1], {}, 400, "the body is not valid JSON"),
    "no JSON at all": (PATH, b"\xff\x00", {}, 400, "the body is not valid JSON"),
    "JSON nested deeply": (PATH, b"[" * 100_000, {}, 400, "the body is not valid JSON"),
    "another name": (PATH, request(name="image"), {}, 400, "image"),
    "another shape": (PATH, request(shape=[1, 6, 6]), {}, 400, "the network reads input: float32 (B, 1, 6, 6)"),
    "another datatype": (PATH, request(datatype="FP64"), {}, 400, "float64"),
    "an unknown datatype": (PATH, request(datatype="BF16"), {}, 400, "the datatype 'BF16'; give one of"),
    "ragged data": (PATH, request(data=[[1.0], [1.0, 2.0]]), {}, 400, "ragged"),
    "NaN in JSON": (PATH, request(data=NAN.tolist()), {}, 400, "the body is not valid JSON"),
    "null for NaN": (PATH, request(data=[None] * 36), {}, 400, "hold null, text or objects, not FP32"),
    "NaN in bytes": (PATH, *binary(NAN.tobytes()), 400, "holds NaN at sample 0"),
    "huge sizes": (PATH, request(shape=[1 << 40, 1, 1 << 30, 6]), {}, 400, "but its data are 36 numbers"),
    "sizes beyond 64 bits": (PATH, request(shape=[1 << 80, 1, 6, 6]), {}, 400, "give a list of sizes"),
    "huge sizes in bytes": (PATH, *binary(X.tobytes(), shape=[1 << 40, 1, 6, 6]), 400, "needs 158329674399744"),
    "more samples than the queue": (PATH, *binary(MANY.tobytes(), shape=MANY.shape), 400, "must have 1 to 1024"),
    "no samples": (PATH, request(shape=[0, 1, 6, 6], data=[]), {}, 400, "the batch has no samples"),
    "too few bytes": (PATH, *binary(X.tobytes()[:-4]), 400, "has 140 bytes, but FP32 [1, 1, 6, 6] needs 144"),
    "too many bytes": (PATH, binary(X.tobytes())[0] + b"1234", binary(X.tobytes())[1], 400, "4 bytes follow the JSON"),
    "bytes that are not there": (PATH, *binary(X.tobytes(), size=1 << 60), 400, "but 144 bytes are left"),
    "a wrong length of the JSON": (PATH, request(), {"Inference-Header-Content-Length": "99999"}, 400, "99999"),
    "a body beyond the limit": (PATH, b" " * ((1 << 20) + 1), {}, 413, "the server takes 1048576"),
    "thresholds for too many exits": (PATH, with_parameters(thresholds=[1, 1, 1]), {}, 400, "3 thresholds given for 3"),
    "NaN as a threshold": (PATH, with_parameters(thresholds="nan,1"), {}, 400, "threshold"),
    "a threshold for an exit left out": (LEFT_OUT, with_parameters(thresholds=[1, 1]), {}, 400, "exit 1 was left out"),
    "an unknown policy": (PATH, with_parameters(policy="fast"), {}, 400, "no policy 'fast'"),
    "no time": (PATH, with_parameters(deadline_ms=0), {}, 400, "deadline_ms must be a number of milliseconds above 0"),
    "an unknown model": ("/v2/models/stage/infer", request(), {}, 404, "there is no model 'stage'"),
    "a path as a model": ("/v2/models/..%2F..%2Fetc%2Fpasswd/infer", request(), {}, 404, "there is no"),
    "an unknown version": ("/v2/models/staged/versions/7/infer", request(), {}, 404, "no version '7', only 1"),
    "a damaged model": ("/v2/models/broken/infer", request(), {}, 503, "the model 'broken' is not ready: "),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_ends_in_one_error_and_the_next_is_served(connection, case):
    path, body, headers, status, text = WRONG[case]
    found, answer = ask(connection, path, body, headers)
    assert found == status and answer.keys() == {"error"}
    assert text in answer["error"] and len(answer["error"]) < 600, answer
    assert ask(connection, PATH, request())[0] == 200
