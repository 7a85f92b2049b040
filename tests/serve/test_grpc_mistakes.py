"""Every wrong gRPC request ends in one clear error, and the server answers the next request."""

import grpc
import numpy as np
import pytest
from grpc import StatusCode
from tritonclient.grpc import service_pb2

from helpers.grpc_serving import refused, request, running, stub
from helpers.serving import pictures


@pytest.fixture(scope="module")
def server(folder):
    (folder / "broken.onnx").write_bytes(b"no model")
    with running(folder) as found:
        yield found


@pytest.fixture(scope="module")
def raw(server):
    with stub(server.grpc.port) as found:
        yield found


def typed(datatype, **contents):
    """A request for `nested` whose input has typed contents."""
    found = service_pb2.ModelInferRequest(model_name="nested")
    one = found.inputs.add(name="input", datatype=datatype, shape=[1, 1, 6, 6])
    for name, values in contents.items():
        getattr(one.contents, name).extend(values)
    return found


def changed(change):
    """A request for `nested`, changed in place."""
    found = request("nested", pictures(1))
    change(found)
    return found


def setting(where, name, value):
    kind = {str: "string_param", int: "int64_param", float: "double_param", bool: "bool_param"}[type(value)]
    setattr(where.parameters[name], kind, value)


def with_parameters(**values):
    return changed(lambda r: [setting(r, name, value) for name, value in values.items()])


NAN = np.where(np.arange(36) == 5, np.nan, 0).astype(np.float32)
WRONG = [
    (changed(lambda r: r.inputs.pop()), "the request has no inputs"),
    (
        changed(lambda r: r.raw_input_contents.append(b"")),
        "raw_input_contents has 2 tensors, but the request has 1 inputs",
    ),
    (changed(lambda r: setattr(r.inputs[0], "name", "")), "every input must have a name"),
    (changed(lambda r: setattr(r.inputs[0], "name", "image")), "image"),
    (changed(lambda r: (r.inputs.append(r.inputs[0]), r.raw_input_contents.append(b""))), "is given twice"),
    (changed(lambda r: r.inputs[0].contents.fp32_contents.append(1)), "both contents and raw_input_contents"),
    (changed(lambda r: r.inputs[0].shape.pop()), "has 144 bytes, but FP32 [1, 1, 6] needs 24"),
    (changed(lambda r: r.inputs[0].shape.append(-1)), "give a list of sizes"),
    (changed(lambda r: setattr(r.inputs[0], "datatype", "FP33")), "the datatype 'FP33'; give one of"),
    (changed(lambda r: setattr(r.inputs[0], "datatype", "BYTES")), "the datatype 'BYTES'; give one of"),
    (changed(lambda r: setattr(r.inputs[0], "datatype", "INT32")), "int32"),
    (changed(lambda r: r.raw_input_contents.__setitem__(0, NAN.tobytes())), "holds NaN at sample 0"),
    (request("nested", pictures(0)), "the batch has no samples"),
    (request("fixed", np.zeros((1, 3), np.float32), "x"), "the network reads float32 (2, 3)"),
    (typed("FP32", fp32_contents=NAN), "holds NaN at sample 0"),
    (typed("FP32", fp32_contents=[1, 2]), "its data are 2 numbers"),
    (typed("FP32"), "its data are 0 numbers"),
    (typed("FP32", int_contents=[1]), "has int_contents, but FP32 needs fp32_contents alone"),
    (typed("FP32", int_contents=[1], fp32_contents=[1]), "but FP32 needs fp32_contents alone"),
    (typed("FP16"), "FP16, which has no typed contents"),
    (typed("BYTES", bytes_contents=[b"1"]), "the datatype 'BYTES'; give one of"),
    (typed("INT8", int_contents=[300] * 36), "outside the range of INT8"),
    (changed(lambda r: setting(r.inputs[0], "shared_memory_region", "a")), "'shared_memory_region', which is unknown"),
    (
        changed(lambda r: setting(r.outputs.add(name="label"), "classification", 3)),
        "'classification', which",
    ),
    (changed(lambda r: r.outputs.add(name="labels")), "no output 'labels'"),
    (with_parameters(priority=1), "'priority', which is unknown; it may have policy, thresholds"),
    (with_parameters(policy="fast"), "no policy 'fast'"),
    (with_parameters(policy=3), "policy must be the name of a policy; got 3"),
    (with_parameters(policy="a", thresholds="1,1"), "policy or thresholds, not both"),
    (with_parameters(thresholds="low"), "thresholds must be a list"),
    (with_parameters(thresholds=True), "thresholds must be a list"),
    (with_parameters(thresholds=0.1), "2"),
    (with_parameters(deadline_ms=-1.0), "deadline_ms must be a number of milliseconds above 0"),
    (with_parameters(deadline_ms="soon"), "deadline_ms must be a number of milliseconds above 0"),
]


@pytest.mark.parametrize(("message", "text"), WRONG, ids=[text[:40] for _, text in WRONG])
def test_a_wrong_request_is_an_invalid_argument(raw, message, text):
    with refused(StatusCode.INVALID_ARGUMENT, text):
        raw.ModelInfer(message)


def test_unknown_models_and_versions_are_not_found_and_damaged_ones_unavailable(raw):
    x = pictures(1)
    for message, code, text in (
        (request("nest", x), StatusCode.NOT_FOUND, "there is no model 'nest'"),
        (request("../nested", x), StatusCode.NOT_FOUND, "there is no model"),
        (request("nested", x, model_version="2"), StatusCode.NOT_FOUND, "no version '2'"),
        (request("broken", x), StatusCode.UNAVAILABLE, "the model 'broken' is not ready: "),
    ):
        with refused(code, text):
            raw.ModelInfer(message)
    for method, kind in ((raw.ModelReady, "ModelReadyRequest"), (raw.ModelMetadata, "ModelMetadataRequest")):
        with refused(StatusCode.NOT_FOUND, "there is no model 'nest'"):
            method(getattr(service_pb2, kind)(name="nest"))
    with refused(StatusCode.NOT_FOUND, "there is no repository 'mine'"):
        raw.RepositoryIndex(service_pb2.RepositoryIndexRequest(repository_name="mine"))


@pytest.mark.parametrize(
    ("method", "code", "text"),
    [
        ("ModelInfer", StatusCode.INVALID_ARGUMENT, "the message is not a valid inference.ModelInferRequest"),
        ("TraceSetting", StatusCode.UNIMPLEMENTED, ""),
    ],
)
def test_bytes_that_are_no_message_and_unknown_methods_are_refused(server, method, code, text):
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc.port}") as channel, refused(code, text):
        channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(b"\xff\xff")
