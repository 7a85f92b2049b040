"""The codec of the protocol, against the client of Triton: what it sends is read, and it reads what is written."""

import json

import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.http._utils import _get_inference_request

from branchynet.errors import InputError
from branchynet.serve.oip import InferRequest, Wanted, infer_answer, read_infer
from branchynet.serve.tensors import DTYPES, NAMES, from_bytes

shapes = hnp.array_shapes(max_dims=4, max_side=4, min_side=0)


def finite(dtype):
    if dtype.kind == "f":
        most = float(np.finfo(dtype).max)
        return st.floats(-most, most, width=8 * dtype.itemsize)
    return hnp.from_dtype(dtype)


arrays = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda name: hnp.arrays(DTYPES[name], shapes, elements=finite(DTYPES[name]))
)


def sent(tensors, binary, parameters=None, outputs=None):
    """The body and the header that Triton's client sends."""
    inputs = []
    for name, array in tensors.items():
        one = triton.InferInput(name, list(array.shape), NAMES[array.dtype])
        one.set_data_from_numpy(array, binary_data=binary)
        inputs.append(one)
    given = dict.fromkeys(("priority", "sequence_id"), 0) | {"request_id": "", "timeout": None}
    body, length = _get_inference_request(
        inputs=inputs, outputs=outputs, sequence_start=False, sequence_end=False, custom_parameters=parameters, **given
    )
    return bytes(body) if isinstance(body, bytes) else body.encode(), None if length is None else str(length)


@given(st.lists(arrays, min_size=1, max_size=3), st.booleans())
def test_tensors_of_a_client_arrive_as_they_are(tensors, binary):
    named = {f"x{n}": array for n, array in enumerate(tensors)}
    if not binary:
        named = {name: array for name, array in named.items() if array.dtype != np.float16}  # the client refuses it
        if not named:
            return
    found = read_infer(*sent(named, binary))
    assert found.inputs.keys() == named.keys()
    for name, array in named.items():
        assert found.inputs[name].dtype == array.dtype
        np.testing.assert_array_equal(found.inputs[name], array)


@given(st.lists(arrays, min_size=1, max_size=3), st.booleans())
def test_a_client_reads_what_is_written(tensors, binary):
    outputs = {f"y{n}": array for n, array in enumerate(tensors)}
    request = InferRequest("seven", {}, outputs=tuple(Wanted(name, binary) for name in outputs))
    body, length = infer_answer("net", "1", request, outputs, 0)
    found = triton.InferResult.from_response_body(body, header_length=length)
    assert found.get_response()["id"] == "seven" and found.get_response()["model_name"] == "net"
    for name, array in outputs.items():
        read = found.as_numpy(name)
        assert not array.size or read.dtype == array.dtype  # the client gives an empty array a dtype of its own
        np.testing.assert_array_equal(read, array)


def test_text_is_read_too():
    names = np.array(["ant", "ö", ""], object)
    for binary in (False, True):
        body, length = infer_answer("net", "1", InferRequest(None, {}, binary=binary), {"names": names}, 0)
        read = triton.InferResult.from_response_body(body, header_length=length).as_numpy("names")
        assert [one.decode() if isinstance(one, bytes) else one for one in read] == ["ant", "ö", ""]


def test_parameters_and_outputs_of_a_client():
    wanted = [triton.InferRequestedOutput("label", binary_data=False), triton.InferRequestedOutput("score")]
    body, length = sent({"x": np.zeros((1, 2), np.float32)}, True, {"policy": "fast", "deadline_ms": 20}, wanted)
    found = read_infer(body, length)
    assert found.outputs == (Wanted("label", False), Wanted("score", True))
    assert found.options.policy == "fast" and found.options.timeout == 0.02


@pytest.mark.parametrize(
    ("given", "thresholds"),
    [([0.5, None], (0.5, None)), ("0.5,never", (0.5, None)), (0.25, (0.25,)), ("1e-3", (0.001,)), ([], ())],
)
def test_thresholds_are_lists_or_text(given, thresholds):
    assert read_infer(request(parameters={"thresholds": given})).options.thresholds == thresholds


def request(data=(1.0, 2.0), shape=(1, 2), datatype="FP32", name="x", **more):
    one = {"name": name, "shape": list(shape), "datatype": datatype, "data": data}
    return json.dumps({"inputs": [one], **more}).encode()


WRONG = {
    "no JSON": (b"{", None, "not valid JSON"),
    "empty": (b"", None, "not valid JSON"),
    "no object": (b"[1]", None, r"JSON object; got \[1\]"),
    "NaN": (request([float("nan"), 1.0]), None, "not valid JSON"),
    "nested deeply": (b"[" * 10_000, None, "not valid JSON"),
    "no inputs": (b"{}", None, "no inputs"),
    "inputs of text": (b'{"inputs": ["x"]}', None, "list of objects"),
    "no name": (b'{"inputs": [{"shape": [1]}]}', None, "must have a name"),
    "unknown key": (request(input=1), None, "'input', which is unknown"),
    "id of a number": (request(id=7), None, "id of a request must be text; got 7"),
    "no datatype": (request(datatype=None), None, "datatype None; give one of BOOL"),
    "unknown datatype": (request(datatype="BF16"), None, "datatype 'BF16'; give one of BOOL"),
    "shape of text": (request(shape=["a", 2]), None, "give a list of sizes"),
    "negative size": (request(shape=[-1, 2]), None, "give a list of sizes"),
    "no shape": (b'{"inputs": [{"name": "x", "datatype": "FP32", "data": [1]}]}', None, "shape None"),
    "many dimensions": (request(shape=[1] * 33), None, "give a list of sizes"),
    "huge sizes": (request(shape=[2**40, 2**40]), None, "but its data are 2 numbers"),
    "other count": (request(shape=[1, 3]), None, "but its data are 2 numbers"),
    "other nesting": (request([[1.0], [2.0]]), None, r"but its data are \[2, 1\]"),
    "ragged": (request([[1.0], [2.0, 3.0]]), None, "ragged"),
    "null": (request([None, 1.0]), None, "hold null, text or objects"),
    "text": (request(["1", "2"]), None, "hold text, not FP32"),
    "objects": (request([{}, {}]), None, "hold null, text or objects"),
    "booleans": (request([True, False]), None, "hold booleans, not FP32"),
    "numbers for booleans": (request([1, 0], datatype="BOOL"), None, "not BOOL"),
    "fractions": (request([1.5, 2.0], datatype="INT64"), None, "hold fractions, not INT64"),
    "too large for INT8": (request([200, 1], datatype="INT8"), None, "outside the range of INT8"),
    "negative for UINT8": (request([-1, 1], datatype="UINT8"), None, "outside the range of UINT8"),
    "too large for FP32": (request([1e39, 1.0]), None, "outside the range of FP32"),
    "larger than any": (request([2**70, 1], datatype="INT64"), None, "not INT64|ragged|valid JSON"),
    "no data": (request(None), None, "needs data"),
    "one number": (request(7.0), None, "needs data"),
    "twice": (
        json.dumps({"inputs": 2 * [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}).encode(),
        None,
        "given twice",
    ),
    "parameters of a list": (request(parameters=[]), None, "must be an object"),
    "unknown parameter": (request(parameters={"treshold": 1}), None, "'treshold', which is unknown"),
    "policy of a number": (request(parameters={"policy": 1}), None, "policy must be the name"),
    "policy and thresholds": (request(parameters={"policy": "a", "thresholds": [1]}), None, "not both"),
    "thresholds of text": (request(parameters={"thresholds": "a,b"}), None, "thresholds must be a list"),
    "thresholds of lists": (request(parameters={"thresholds": [[1]]}), None, "thresholds must be a list"),
    "thresholds of booleans": (request(parameters={"thresholds": True}), None, "thresholds must be a list"),
    "no time": (request(parameters={"deadline_ms": 0}), None, "deadline_ms must be a number of milliseconds above 0"),
    "time of text": (request(parameters={"deadline_ms": "1"}), None, "deadline_ms must be a number"),
    "flag of text": (request(parameters={"binary_data_output": "yes"}), None, "must be true or false"),
    "header of text": (request(), "ten", "must be the number of bytes of the JSON"),
    "header too large": (request(), "99999", "but the body has"),
    "header negative": (request(), "-1", "but the body has"),
    "header of many digits": (request(), "9" * 5000, "but the body has"),
    "bytes left": (request() + b"1234", str(len(request())), "4 bytes follow"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case):
    body, length, message = WRONG[case]
    with pytest.raises(InputError, match=message) as error:
        read_infer(body, length)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("size", "data", "message"),
    [
        (8, b"1234", "but 4 bytes are left"),
        (-1, b"", "must be the number of bytes"),
        ("8", b"12345678", "must be the number of bytes"),
        (4, b"1234", r"has 4 bytes, but FP32 \[1, 2\] needs 8"),
        (True, b"12345678", "must be the number of bytes"),
    ],
)
def test_binary_sizes_must_be_right(size, data, message):
    one = {"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [one]}).encode()
    with pytest.raises(InputError, match=message):
        read_infer(head + data, str(len(head)))


def test_nan_and_odd_booleans_are_refused():
    x = np.zeros((3, 2), np.float32)
    x[1, 0] = np.nan
    with pytest.raises(InputError, match="holds NaN at sample 1"):
        from_bytes("x", "FP32", [3, 2], x.tobytes())
    with pytest.raises(InputError, match="other than 0 and 1"):
        from_bytes("x", "BOOL", [2], b"\x01\x02")


def test_an_output_that_is_not_there_is_named():
    request = InferRequest(None, {}, outputs=(Wanted("scores", False),))
    with pytest.raises(InputError, match="no output 'scores'; did you mean 'score'"):
        infer_answer("net", "1", request, {"score": np.zeros(1, np.float32)}, 0)


@given(st.binary(max_size=60), st.one_of(st.none(), st.integers(0, 70).map(str)))
def test_any_bytes_are_read_or_refused(body, length):
    try:
        read_infer(body, length)
    except InputError:
        pass
