"""Run a network stage by stage in PyTorch, on any device, without an exported file."""

import contextlib
import math
import sys
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..argument_checks import instance, ordered, whole
from ..errors import GraphError, InputError, first_line
from ..graph.free_lengths import Free
from ..graph.torch_program import CUDA_ROWS, tensors_of
from ..graph.torch_stages import cut_stages
from ..nn.calls import arguments
from ..nn.checks import check_network, device_of, resolve_device
from ..nn.fingerprint import fingerprint
from ..policy.exit_record import check_same_network
from ..policy.exit_rule import as_deployed
from ..policy.prediction import Prediction, concatenated
from ..policy.values import Choice, Policy
from .call_thresholds import Thresholds, call_thresholds, none_given
from .eager_stages import EagerStages
from .input_checks import Input, check_sizes, checked_inputs
from .recorded_stages import RecordedStages
from .reference_outputs import answers_alone
from .tolerance import differences, tolerances
from .torch_precision import Precision, check_precision, in_precision

_EPS = float(torch.finfo(torch.float32).eps)


_FILES_ONLY = "; only engines of files have it: load(export(net, path, ...))"
_STAGES_ONLY = "; only the engine of a folder of stages has it: load(export(..., layout='stages'))"
_INSTEAD = {
    "answer_all": "; call the engine itself, once per batch",
    "outputs": _FILES_ONLY,
    "labels": _FILES_ONLY,
    "metadata": _FILES_ONLY,
    "stages": _STAGES_ONLY,
    "stage": _STAGES_ONLY,
    "stream": _STAGES_ONLY,
}


@dataclass(frozen=True)
class TensorInput(Input):
    """An input that also accepts a torch tensor, on any device."""

    tensor_dtype: torch.dtype

    def accepts(self, array: Any) -> bool:
        """Whether `array` has this dtype and, after the batch dimension, this shape."""
        if isinstance(array, Tensor):
            return array.dtype == self.tensor_dtype and self.fits(tuple(array.shape))
        return self.dtype is not None and super().accepts(array)

    def taken(self, given: Any) -> Any:
        """Return the input unchanged."""
        return given

    @property
    def dtype_name(self) -> str:
        """Such as ``float32``."""
        return str(self.tensor_dtype).removeprefix("torch.")


class TorchEngine:
    """A network with early exits that runs in PyTorch. It predicts like an exported file.

    The stages between two exits run in one of two ways. With *batch sizes*, by default on a CUDA device, each stage is
    recorded once per size as a CUDA graph. A call replays the stages at the smallest sizes that hold the samples; the
    host waits once per exit for the number of samples that stay, and once for the answers. The first use of a stage at
    a size takes a fraction of a second, or far longer with `compile`; `prepare` takes this time in advance. Without
    batch sizes, the operators of each stage run one by one.

    Stages share the network's parameters and buffers: after a change in place (``optimizer.step()``,
    ``load_state_dict``) the next call uses the new values. Make a new engine after replacing or moving them. Calls are
    thread-safe; with batch sizes, one call runs at a time.

    Args:
        net: a `BranchyNet`, or any network (see `branchynet.nn.network.exit_outputs`). It runs in eval mode.
        policy: score and default thresholds, or a `Choice` of them; an exit with threshold None is left out with its
            branch.
        example: one batch of inputs: a tensor, a tuple of tensors, or a dict of keyword arguments. Give at least two
            rows, so that a network that mixes the samples of a batch is refused. Batch sizes keep the memory layout of
            the example, such as channels_last.
        device: where to run; by default where `net` is. `net` is moved there.
        free: lengths of the inputs that may differ from the example, as for `export`. Such an engine has no batch
            sizes.
        precision: ``"fp16"`` or ``"bf16"`` computes in half precision, with a copy of `net`, which does not follow
            later changes of `net`. Inputs and outputs stay float32, and scores are computed in float32.
        compile: whether to compile the stages with `torch.compile`: each once for all batch sizes from 2, and once
            more for 1.
        batch_sizes: the sizes at which stages run; a larger batch is answered in parts of the largest. By default, on a
            CUDA device, 28 sizes from 1 to 256, as far as memory allows, and elsewhere none. Empty for none. On other
            devices than CUDA, stages run at these sizes without a recording.

    Attributes:
        inputs: the inputs of the network.
        lengths: the free lengths besides the batch size, and their sizes.
        policy: score and default thresholds.
        num_exits: N.
        device: where it runs.
        precision: as given.
        batch_sizes: the sizes at which stages run, ascending; empty if at any size.

    Raises:
        InputError: the policy has a number of thresholds other than N-1, or an unknown score; the choice is for other
            weights; there is no example, or it holds no tensors with a leading batch dimension; `device`, `precision`
            or `batch_sizes` is wrong or does not fit the other arguments; there is not enough memory, and the message
            names the size that fits.
        GraphError: the network cannot be exported with a free batch size or cut into stages (see `cut_stages`), or its
            outputs stage by stage differ from those for each row alone; it cannot be compiled, recorded, or computed in
            half precision.

    Example:
        >>> import torch
        >>> from branchynet import BranchyNet, Policy, TorchEngine
        >>> from torch import nn
        >>> net = BranchyNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), {"1": nn.Linear(8, 3)})
        >>> engine = TorchEngine(net, Policy(thresholds=(2.0,)), torch.randn(2, 4), batch_sizes=(1, 4))
        >>> engine(torch.randn(5, 4)).exit.tolist()
        [1, 1, 1, 1, 1]
    """

    def __init__(
        self,
        net: nn.Module,
        policy: Policy | Choice,
        example: Any = None,
        *,
        device: str | torch.device | None = None,
        free: Free | None = None,
        precision: Precision = "float32",
        compile: bool = False,
        batch_sizes: Sequence[int] | None = None,
    ) -> None:
        check_network(net)
        check_precision(precision)
        if isinstance(policy, Choice):
            check_same_network("the network and the choice", fingerprint(net), policy.network)
            policy = policy.policy
        instance("policy", policy, Policy, "give Policy(thresholds=(...)), or what choose(...) returns")
        if example is None:
            raise InputError("TorchEngine needs an example: give one batch of inputs, such as next(iter(loader))[0]")
        tensors = tensors_of(example)
        sizes = _checked_sizes(batch_sizes, free)
        with _enough_memory("the network and its example", len(tensors[0])):
            if device is not None:
                net.to(resolve_device(device))
            self.device = device_of(net, device or "cpu")
            tensors = tuple(t.to(self.device) for t in tensors)
            kwargs = arguments(example)[1]
            moved = dict(zip(kwargs, tensors, strict=True)) if kwargs else tensors
            run, given = in_precision(net, moved, precision)
            self._cut = cut = cut_stages(run, given, policy, free)
        self.lengths = cut.lengths
        self.policy = policy
        self.precision = precision
        self.num_exits = policy.num_exits
        unfixed = {place for length in cut.lengths for place in length.at}
        self.inputs = tuple(_input(name, tensor, unfixed) for name, tensor in zip(cut.arguments, tensors, strict=True))
        self._exits = tuple(stage.exit for stage in cut.stages)
        taken = tensors_of(given)
        if sizes or (sizes is None and self.device.type == "cuda" and free is None):
            rows = [t if len(t) > 1 else torch.cat([t, t]) for t in taken]
            self._stages = RecordedStages(cut, rows, sizes, compile=compile)
            self.batch_sizes = self._stages.sizes
            self._most = self.batch_sizes[-1]
        else:
            self._stages = EagerStages(cut, self.device, [t.dtype for t in taken], compile=compile)
            self.batch_sizes = ()
            self._most = CUDA_ROWS if self.device.type == "cuda" else sys.maxsize
        self._sample = tuple(t[:1].clone() for t in tensors)
        self._check(run, given, moved)

    def __getattr__(self, name: str) -> Any:  # runs only for names that are not there
        hint = _INSTEAD.get(name, "")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

    def __call__(self, /, *inputs: Any, thresholds: Thresholds | None = None, **named: Any) -> Prediction:
        """Predict a batch of any size, including zero. Each sample leaves at the first exit with a low enough score.

        Args:
            inputs: arrays or tensors that match the attribute `inputs`, all with the same batch size; or one mapping
                from input names to them.
            thresholds: N-1 thresholds for this call instead of the policy's; None means that no sample leaves there.
                Each may be an array `(B,)`, with one threshold per sample; or give a list of B policies.
            named: the inputs that are not given by position, by name.

        Returns:
            A `Prediction` of numpy arrays.

        Raises:
            InputError: inputs of the wrong number, names, shape or dtype, or the wrong number of thresholds; there is
                not enough memory for a batch of this size.
            GraphError: a stage cannot be compiled or recorded at a size; see `prepare`.
        """
        taken, rows = checked_inputs(inputs, named, self.inputs)
        check_sizes(taken, self.lengths, "this engine")
        used: Sequence[float | NDArray[Any] | None] = self.policy.thresholds
        if not none_given(thresholds, rows):
            remedy = "make an engine with a threshold there"
            used = call_thresholds(thresholds, self.policy, rows, where="this engine", remedy=remedy)
        if not rows:
            tail = self._cut.output_shape
            output, label = np.empty((0, *tail), np.float32), np.empty((0, *tail[1:]), np.int64)
            return Prediction(label, np.empty(0, np.int64), np.empty(0, np.float32), output)
        limits: list[float | NDArray[Any]] = [
            t if isinstance(t, np.ndarray) and len(t) > 1 else as_deployed([float(np.squeeze(t))]).item()
            for t in used
            if t is not None
        ]
        arrays = list(taken.values())
        with _enough_memory("a call", min(rows, self._most)):
            parts = [slice(start, start + self._most) for start in range(0, rows, self._most)]
            return concatenated([self._stages([x[p] for x in arrays], [_part(t, p) for t in limits]) for p in parts])

    def prepare(self, batch_sizes: Sequence[int] | None = None) -> None:
        """Compile and record the stages at these sizes now, so that later calls do not take the time.

        Args:
            batch_sizes: some of the engine's batch sizes; by default all.

        Raises:
            InputError: the engine does not have one of the sizes; there is not enough memory.
            GraphError: a stage cannot be compiled or recorded.
        """
        sizes = self.batch_sizes if batch_sizes is None else _checked_sizes(batch_sizes, None) or ()
        if unknown := sorted(set(sizes) - set(self.batch_sizes)):
            raise InputError(f"the engine has no batch size {unknown[0]}; it has {self.batch_sizes or 'none'}")
        for size in reversed(sizes):  # the largest first: it makes the memory that the others use
            rows = [t.expand(size, *t.shape[1:]) for t in self._sample]
            self(*rows, thresholds=[None] * (self.num_exits - 1))

    def _check(self, net: nn.Module, example: Any, given: Any) -> None:
        """Compare each exit, then a mix of exits, with the network on each row alone. Raise `GraphError`."""
        alone = [exit.numpy() for exit in answers_alone(net, example, 4)]
        expected = np.stack(alone, axis=1)
        inputs = [t[: len(expected)] for t in tensors_of(given)]
        coarsest = max((torch.finfo(p.dtype).eps for p in net.parameters() if p.is_floating_point()), default=0.0)
        # In TF32 and half precision, a batch and its rows alone differ a little.
        coarse = self.device.type != "cpu" or coarsest > _EPS or torch.get_float32_matmul_precision() != "highest"
        most = np.stack([tolerances(exit, max(1e-2, 16 * coarsest), coarse=coarse) for exit in alone], axis=1)
        parting: list[float | None] = [None] * (self.num_exits - 1)
        forced = [tuple(None if k != n else math.inf for k in range(1, self.num_exits)) for n in self._exits]
        for n, thresholds in zip((*self._exits, None), (*forced, parting), strict=True):
            answer = self(*inputs, thresholds=thresholds)
            at = range(len(expected)), answer.exit - 1
            off, allowed = differences(answer.output, expected[at]).reshape(len(expected), -1), most[at]
            if (beyond := off / allowed.reshape(off.shape)).max() > 1:
                row, figure = np.unravel_index(beyond.argmax(), off.shape)
                raise GraphError(
                    f"outputs of exit {answer.exit[row]} differ by {off[row, figure]:.3g} from those for the same row "
                    f"alone (allowed {allowed[row].flat[figure]:.3g}); does the network's forward depend on the other "
                    "samples of the batch?"
                )
            if n is not None and n < self.num_exits:
                middle = float(np.sort(answer.score)[len(answer.score) // 2])
                parting[n - 1] = None if math.isnan(middle) else middle


def _input(name: str, tensor: Tensor, free: Container[tuple[str, int]]) -> TensorInput:
    try:
        dtype: Any = torch.empty(0, dtype=tensor.dtype).numpy().dtype
    except TypeError:  # numpy has no bfloat16: such an input must be a tensor
        dtype = None
    shape = tuple(None if (name, axis) in free else size for axis, size in enumerate(tensor.shape[1:], 1))
    return TensorInput(name, dtype, shape, tensor.dtype)


def _checked_sizes(sizes: Any, free: Free | None) -> tuple[int, ...] | None:
    """Return the batch sizes in ascending order. Raise `InputError` if they are not whole numbers of at least 1."""
    if sizes is None:
        return None
    remedy = "give a list such as (1, 8, 64), or () to run at any size without recording"
    sizes = ordered("batch_sizes", sizes, remedy)
    sizes = tuple(sorted({whole("batch_sizes", size, 1, CUDA_ROWS) for size in sizes}))
    if sizes and free is not None:
        raise InputError(f"batch_sizes={sizes} needs inputs of fixed lengths; leave out free={free!r}, or batch_sizes")
    return sizes


def _part(threshold: float | NDArray[Any], rows: slice) -> float | NDArray[Any]:
    """Return the thresholds of some rows of a batch; a number is for all samples."""
    own = threshold[rows] if isinstance(threshold, np.ndarray) else threshold
    return own.item() if isinstance(own, np.ndarray) and len(own) == 1 else own


@contextlib.contextmanager
def _enough_memory(what: str, rows: int) -> Iterator[None]:
    """Convert errors of memory to `InputError`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"there is not enough memory for {what} with a batch of {rows} ({first_line(error)}); give a smaller "
            "batch, or free memory of the device"
        ) from error
