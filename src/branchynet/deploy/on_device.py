"""Run ONNX graphs on a device with inputs and outputs that stay there.

A caller's arrays are copied to the device once. The label, score and output of each stage are copied back, and the
values that later stages read stay there. The same code runs with the CPU as the device.

Shape letters: R rows of a value, S rows that are read from it, P rows of a buffer.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..errors import InputError, RunError, first_line
from ..extras import needed_by
from .input_checks import Input

Provider = tuple[str, dict[str, Any]]
DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}  # where a provider's values are
_OPSET, _IR = 13, 8  # that every version of ONNX Runtime reads


@dataclass(frozen=True)
class Device:
    """Where values are, and which provider picks their rows.

    Attributes:
        kind: as ONNX Runtime names it, such as ``cuda``.
        index: the number of the device.
        provider: the provider that picks rows.
        recorded: whether the caller asked the provider to record graphs (``enable_cuda_graph``).
    """

    kind: str
    index: int
    provider: Provider
    recorded: bool = False

    def holding(self, array: NDArray[Any]) -> Any:
        """Return a copy of an array on this device."""
        array = np.array(array, order="C")  # on the CPU, an OrtValue shares the memory of the array
        return onnxruntime.OrtValue.ortvalue_from_numpy(array, self.kind, self.index)

    def empty(self, shape: Sequence[Any], dtype: Any) -> Any:
        """Return uninitialized memory on this device."""
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, self.kind, self.index)


@dataclass(frozen=True)
class DeviceInput(Input):
    """An input that also accepts a torch tensor on the device of the graph, and leaves it there."""

    kind: str = "cuda"

    def accepts(self, array: Any) -> bool:
        """Whether `array` has this dtype and, after the batch dimension, this shape."""
        if not self._here(array):
            return super().accepts(array)
        return str(array.dtype) == f"torch.{self.dtype_name}" and self.fits(tuple(array.shape))

    def taken(self, given: Any) -> Any:
        """Return a tensor on the device unchanged, and other tensors as arrays."""
        return given if self._here(given) else super().taken(given)

    def _here(self, given: Any) -> bool:
        return hasattr(given, "detach") and given.device.type == self.kind


@dataclass(frozen=True)
class OnDevice:
    """Rows of a value on a device.

    Attributes:
        value: an ``OrtValue`` of R rows or more.
        rows: `(S,)` which of its rows; None for the first `count`.
        count: S.
    """

    value: Any
    rows: NDArray[np.int64] | None
    count: int

    def __len__(self) -> int:
        return self.count

    def take(self, kept: NDArray[np.int64], axis: int = 0) -> "OnDevice":
        """Return some of these rows. Nothing is copied before a graph reads them."""
        assert axis == 0
        return OnDevice(self.value, kept if self.rows is None else self.rows[kept], len(kept))


@dataclass(frozen=True)
class RowPicker:
    """Picks rows of values on their device, with one small graph per type."""

    device: Device
    _sessions: dict[int, Any] = field(default_factory=dict)

    def __call__(self, given: OnDevice, into: Any = None) -> Any:
        """Return an ``OrtValue`` of the rows, or write them `into` one of P rows, where others repeat the first."""
        whole = len(given) == given.value.shape()[0] and given.rows is None
        if whole and into is None:
            return given.value
        rows = np.arange(len(given)) if given.rows is None else given.rows
        if into is not None:
            rows = np.append(rows, np.full(into.shape()[0] - len(rows), rows[0]))
        session = self._session(given.value.element_type())
        binding = session.io_binding()
        binding.bind_ortvalue_input("values", given.value)
        chosen = self.device.holding(rows.astype(np.int64))  # a binding does not keep the memory of arrays alive
        binding.bind_ortvalue_input("rows", chosen)
        if into is None:
            binding.bind_output("picked", self.device.kind, self.device.index)
        else:
            binding.bind_ortvalue_output("picked", into)
        _run(session, binding, None)
        return binding.get_outputs()[0]

    def _session(self, kind: int) -> Any:
        if kind not in self._sessions:
            with needed_by("picking rows on a device", extra="verify"):
                from onnx import TensorProto, helper
            values = [helper.make_tensor_value_info(name, kind, None) for name in ("values", "picked")]
            rows = helper.make_tensor_value_info("rows", TensorProto.INT64, None)
            graph = helper.make_graph(
                [helper.make_node("Gather", ["values", "rows"], ["picked"])], "pick", [values[0], rows], [values[1]]
            )
            model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            self._sessions[kind] = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=[self.device.provider]
            )
        return self._sessions[kind]


def picker_of(providers: Sequence[Provider]) -> RowPicker | None:
    """Return what picks rows where the first provider keeps its values; None on the host."""
    name, options = providers[0]
    if name not in DEVICES:
        return None
    kind, index = DEVICES[name], int(options.get("device_id", 0))
    cuda = ("CUDAExecutionProvider", {"device_id": str(index)})
    recorded = str(options.get("enable_cuda_graph", 0)).lower() in ("1", "true")
    return RowPicker(Device(kind, index, cuda if kind == "cuda" else (name, {}), recorded))


class DeviceGraph:
    """A graph whose inputs and outputs are bound to a device.

    Args:
        session: an ``InferenceSession``.
        picker: picks rows on the device of the session.
    """

    def __init__(self, session: Any, picker: RowPicker) -> None:
        self.device, self.picker = picker.device, picker
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]

    def placed(self, given: Any, *, keep: bool) -> Any:
        """Return an input of a call as `OnDevice` if later stages read it or if it is a tensor there already."""
        if isinstance(given, np.ndarray):
            return OnDevice(self.device.holding(given), None, len(given)) if keep else given
        return OnDevice(shared(given), None, len(given))

    def run(self, feeds: Mapping[str, Any]) -> list[NDArray[Any]]:
        """Return all outputs as arrays."""
        return self.bound(feeds, len(self._outputs))

    def bound(self, feeds: Mapping[str, Any], host: int) -> list[Any]:
        """Return the first `host` outputs as arrays, and the others where they are, as `OnDevice`.

        Inputs are arrays, torch tensors on the device, or `OnDevice`.
        """
        binding = self._session.io_binding()
        held = {name: self._value(given) for name, given in feeds.items()}  # alive until the graph has run
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
        for place, name in enumerate(self._outputs):
            if place < host:
                binding.bind_output(name, "cpu")
            else:
                binding.bind_output(name, self.device.kind, self.device.index)
        _run(self._session, binding, _unrecorded() if self.device.recorded else None)
        found = binding.get_outputs()
        return [v.numpy() if k < host else OnDevice(v, None, v.shape()[0]) for k, v in enumerate(found)]

    def _value(self, given: Any) -> Any:
        if isinstance(given, np.ndarray):  # `bind_cpu_input` refuses inputs with defaults, such as thresholds
            return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(given))
        return self.picker(given) if isinstance(given, OnDevice) else shared(given)

    def recording(self, inputs: Sequence[Input], outputs: Sequence[Input], host: int) -> "RecordedGraph":
        """Return a graph with the same outputs as `bound`, which runs on fixed memory."""
        return RecordedGraph(self._session, self.device, self.picker, inputs, outputs, host)


class RecordedGraph:
    """A graph without control flow that the provider records once per batch size, and replays.

    Its inputs and outputs are buffers of P rows, the next power of two; further rows repeat the first sample. The
    outputs on the device are the buffers themselves, so one call must end before the next begins.
    """

    def __init__(
        self,
        session: Any,
        device: Device,
        picker: RowPicker,
        inputs: Sequence[Input],
        outputs: Sequence[Input],
        host: int,
    ) -> None:
        if free := [i for i in (*inputs, *outputs) if None in i.shape]:
            raise InputError(
                f"enable_cuda_graph needs fixed shapes, and {free[0].name!r} has a free length, {free[0]}: leave the "
                "option out, or export with free='batch'"
            )
        self._session, self._device, self._picker, self._host = session, device, picker, host
        self._inputs, self._outputs = inputs, outputs
        self._buffers: dict[int, tuple[Any, dict[str, Any], list[Any], Any]] = {}

    def __call__(self, feeds: Mapping[str, Any]) -> list[Any]:
        """Return the outputs for R rows; arguments and results are those of `DeviceGraph.bound`."""
        rows = len(next(iter(feeds.values())))
        binding, into, out, options = self._of_size(1 << (rows - 1).bit_length())
        for name, given in feeds.items():
            if isinstance(given, np.ndarray):
                buffer = into[name]
                repeated = np.broadcast_to(given[:1], (buffer.shape()[0] - rows, *given.shape[1:]))
                buffer.update_inplace(np.ascontiguousarray(np.concatenate([given, repeated])))
            else:
                self._picker(given if isinstance(given, OnDevice) else OnDevice(shared(given), None, rows), into[name])
        _run(self._session, binding, options)
        return [
            np.array(value.numpy()[:rows]) if k < self._host else OnDevice(value, None, rows)
            for k, value in enumerate(out)
        ]

    def _of_size(self, rows: int) -> tuple[Any, dict[str, Any], list[Any], Any]:
        if rows not in self._buffers:
            binding = self._session.io_binding()
            into = {i.name: self._device.empty((rows, *i.shape), i.dtype) for i in self._inputs}
            out = [self._device.empty((rows, *o.shape), o.dtype) for o in self._outputs]
            for name, value in into.items():
                binding.bind_ortvalue_input(name, value)
            for output, value in zip(self._outputs, out, strict=True):
                binding.bind_ortvalue_output(output.name, value)
            options = onnxruntime.RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(rows))  # one graph per batch size
            self._buffers[rows] = binding, into, out, options
        return self._buffers[rows]


def shared(tensor: Any) -> Any:
    """Return a torch tensor as an ``OrtValue`` on the same memory, when the tensor's values are there."""
    if tensor.is_cuda:
        sys.modules["torch"].cuda.current_stream(tensor.device).synchronize()
    return onnxruntime.OrtValue.from_dlpack(tensor.detach().contiguous())


def _run(session: Any, binding: Any, options: Any) -> None:
    try:
        session.run_with_iobinding(binding, options)
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise RunError(
            f"ONNX Runtime fails on its device ({first_line(error)}): give fewer samples per call, look for values "
            "outside of their range, or load the file without providers"
        ) from error


def _unrecorded() -> Any:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", "-1")
    return options
