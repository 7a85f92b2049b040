"""What Triton does with a model repository, as its documentation says: shapes, reshapes, and calls of Python models."""

import asyncio
import importlib.util
import sys
import types

import numpy as np
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from branchynet.deploy.loading import DTYPES

TYPES = {"bool": "BOOL", "float16": "FP16", "float32": "FP32", "float64": "FP64", "int64": "INT64", "int32": "INT32"}


def read_config(folder):
    """The configuration in a model's folder, by Triton's published schema."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def run(folder, config, inputs):
    """Run an ONNX model on `(B, dims)` inputs; the outputs are `(B, dims)` too."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", options, providers=["CPUExecutionProvider"])
    assert {one.name for one in session.get_inputs()} == {one.name for one in config.input} == {*inputs}
    kinds = {one.name: DTYPES[one.type] for one in (*session.get_inputs(), *session.get_outputs())}
    feeds = {}
    for one in config.input:
        check(one, inputs[one.name], kinds[one.name], config.max_batch_size)
        value = inputs[one.name]
        feeds[one.name] = value.reshape(len(value), *one.reshape.shape) if one.HasField("reshape") else value
    found = session.run([one.name for one in config.output], feeds)
    outputs = {}
    for one, value in zip(config.output, found, strict=True):
        inner = one.reshape.shape if one.HasField("reshape") else one.dims
        assert value.shape[1:] == tuple(inner)
        outputs[one.name] = value.reshape(len(value), *one.dims)
        check(one, outputs[one.name], kinds[one.name], config.max_batch_size)
    return outputs


def check(one, value, dtype, most):
    assert model_config_pb2.DataType.Name(one.data_type) == f"TYPE_{TYPES[np.dtype(dtype).name]}"
    assert value.dtype == np.dtype(dtype) and value.shape[1:] == tuple(one.dims) and 1 <= len(value) <= most


class Tensor:
    def __init__(self, name, value):
        self.tensor_name, self._value = name, value

    def as_numpy(self):
        return self._value


class Answer:
    def __init__(self, output_tensors, error=None):
        self.tensors, self._error = output_tensors, error

    def has_error(self):
        return self._error is not None

    def error(self):
        return self._error


class TritonError:
    def __init__(self, text):
        self._text = text

    def message(self):
        return self._text


def by_name(holder, name):
    return next((one for one in holder.tensors if one.tensor_name == name), None)


def python_model(repository, name, called):
    """Open the Python model `name`; `called` collects the models that it asks, with the number of samples."""

    class InferenceRequest:
        def __init__(self, model_name, requested_output_names, inputs):
            self.model, self.wanted, self.tensors = model_name, requested_output_names, inputs

        async def async_exec(self):
            await asyncio.sleep(0)
            config = read_config(repository / self.model)
            inputs = {one.tensor_name: one.as_numpy() for one in self.tensors}
            called.append((self.model, len(next(iter(inputs.values())))))
            try:
                found = run(repository / self.model, config, inputs)
            except Exception as error:
                return Answer([], TritonError(str(error)))
            return Answer([Tensor(name, found[name]) for name in self.wanted])

    utils = types.ModuleType("triton_python_backend_utils")
    utils.__dict__.update(
        Tensor=Tensor, InferenceRequest=InferenceRequest, InferenceResponse=Answer, TritonError=TritonError,
        get_input_tensor_by_name=by_name, get_output_tensor_by_name=by_name,
    )  # fmt: skip
    spec = importlib.util.spec_from_file_location("triton_model", repository / name / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[utils.__name__] = utils
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[utils.__name__]
    found = module.TritonPythonModel()
    found.initialize({"model_repository": str(repository / name), "model_version": "1", "model_name": name})
    return found
