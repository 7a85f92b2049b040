"""The Open Inference Protocol, version 2: requests and answers of gRPC.

Sources: https://github.com/kserve/open-inference-protocol, and
https://github.com/triton-inference-server/common/blob/main/protobuf/grpc_service.proto for the model repository and for
streams.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from ..errors import InputError
from .oip import InferRequest, Wanted, check_known, read_options, wanted_outputs
from .tensors import NAMES, from_bytes, from_json, text_bytes

pb: Any = service_pb2  # its classes are made when it is imported
_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def parsed(kind: type[Message], data: bytes) -> Any:
    """Read a message. Raises `InputError`."""
    try:
        return kind.FromString(data)  # type: ignore[attr-defined]
    except DecodeError:
        raise InputError(f"the message is not a valid {kind.DESCRIPTOR.full_name}; send one") from None


def read_infer(message: Any) -> InferRequest:
    """Read a ``ModelInferRequest``, with typed contents or ``raw_input_contents``. Raises `InputError`."""
    raw = message.raw_input_contents
    if not message.inputs:
        raise InputError("the request has no inputs; give a list of tensors as 'inputs'")
    if raw and len(raw) != len(message.inputs):
        raise InputError(
            f"raw_input_contents has {len(raw)} tensors, but the request has {len(message.inputs)} inputs; give all "
            "inputs there, in the same order, or none"
        )
    inputs: dict[str, NDArray[Any]] = {}
    for n, tensor in enumerate(message.inputs):
        name = tensor.name
        if not name or name in inputs:
            raise InputError(f"input {name!r} is given twice" if name else "every input must have a name")
        check_known(tensor.parameters, (), f"input {name!r}")
        if raw:
            if tensor.HasField("contents"):
                raise InputError(f"input {name!r} has both contents and raw_input_contents; give one of them")
            inputs[name] = from_bytes(name, tensor.datatype, list(tensor.shape), raw[n])
        else:
            inputs[name] = _typed(tensor)
    outputs = []
    for output in message.outputs:
        check_known(output.parameters, (), f"output {output.name!r}")
        outputs.append(Wanted(output.name, bool(raw)))
    return InferRequest(message.id, inputs, read_options(values_of(message.parameters)), tuple(outputs), bool(raw))


def infer_answer(
    model: str, version: str, request: InferRequest, outputs: Mapping[str, NDArray[Any]], unfinished: int
) -> Any:
    """Return a ``ModelInferResponse`` with raw contents, or with typed contents if those of the request are typed.

    The arguments and errors are those of the function of the same name in `branchynet.serve.oip`.
    """
    answer = pb.ModelInferResponse(model_name=model, model_version=version, id=request.id)
    if unfinished:
        answer.parameters["unfinished"].int64_param = unfinished
    wanted = [(one.name, outputs[one.name]) for one in wanted_outputs(request, outputs)]
    raw = request.binary or any(array.dtype == np.float16 for _, array in wanted)  # which has no typed contents
    for name, array in wanted:
        text = array.dtype.kind == "O"
        tensor = answer.outputs.add(name=name, datatype="BYTES" if text else NAMES[array.dtype], shape=array.shape)
        if raw:
            answer.raw_output_contents.append(text_bytes(array) if text else array.tobytes())
        else:
            values = [t.encode() for t in array.ravel()] if text else array.ravel().tolist()
            getattr(tensor.contents, _CONTENTS[tensor.datatype]).extend(values)
    return answer


def values_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of parameters by name; None for those without one."""
    return {
        name: None if (kind := value.WhichOneof("parameter_choice")) is None else getattr(value, kind)
        for name, value in parameters.items()
    }


def _typed(tensor: Any) -> NDArray[Any]:
    name, field = tensor.name, _CONTENTS.get(tensor.datatype)
    filled = [one.name for one, _ in tensor.contents.ListFields()]
    if tensor.datatype == "FP16":
        raise InputError(f"input {name!r} is FP16, which has no typed contents; give all inputs in raw_input_contents")
    if field is not None and filled not in ([], [field]):
        raise InputError(f"input {name!r} has {', '.join(filled)}, but {tensor.datatype} needs {field} alone")
    values = [] if field is None else list(getattr(tensor.contents, field))
    return from_json({"datatype": tensor.datatype, "shape": list(tensor.shape), "data": values}, name)
