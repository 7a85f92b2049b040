"""Run a network stage by stage in PyTorch, on any device, without an exported file."""

import math
import sys
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import GraphError
from ..graph.free_lengths import Free
from ..graph.torch_program import CUDA_ROWS, tensors_of
from ..graph.torch_stages import cut_stages
from ..nn.calls import arguments
from ..nn.checks import check_network, device_of, resolve_device
from ..policy.exit_rule import as_deployed, stays
from ..policy.prediction import Prediction, concatenated
from ..policy.values import Policy
from .call_thresholds import Thresholds, call_thresholds, check_lengths, none_given, thresholds_of_parts
from .input_checks import Input, check_sizes, checked_inputs
from .reference_outputs import answers_alone
from .tolerance import differences, tolerances

_EPS = float(torch.finfo(torch.float32).eps)


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

    Each exit costs one `nonzero`, for which a GPU waits for the host, and one `index_select` per tensor that the next
    stage reads. Stages share the network's parameters and buffers: after a change in place (``optimizer.step()``,
    ``load_state_dict``) the next call uses the new values. Make a new engine after replacing or moving them. Calls are
    thread-safe.

    Args:
        net: a `BranchyNet`, or any network (see `branchynet.nn.network.exit_outputs`). It runs in eval mode.
        policy: score and default thresholds; an exit with threshold None is left out with its branch.
        example: one batch of inputs: a tensor, a tuple of tensors, or a dict of keyword arguments. Give at least two
            rows, so that a network that mixes the samples of a batch is refused.
        device: where to run; by default where `net` is. `net` is moved there.
        free: lengths of the inputs that may differ from the example, as for `export`.

    Attributes:
        inputs: the inputs of the network.
        lengths: the free lengths besides the batch size, and their sizes.
        policy: as given.
        num_exits: N.
        device: where it runs.

    Raises:
        InputError: the policy has a number of thresholds other than N-1, or an unknown score; the example holds no
            tensors with a leading batch dimension.
        GraphError: the network cannot be exported with a free batch size or cut into stages (see `cut_stages`), or its
            outputs stage by stage differ from those for each row alone.

    Example:
        >>> import torch
        >>> from branchynet import BranchyNet, Policy, TorchEngine
        >>> from torch import nn
        >>> net = BranchyNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), {"1": nn.Linear(8, 3)})
        >>> engine = TorchEngine(net, Policy(thresholds=(2.0,)), torch.randn(2, 4))
        >>> engine(torch.randn(5, 4)).exit.tolist()
        [1, 1, 1, 1, 1]
    """

    def __init__(
        self,
        net: nn.Module,
        policy: Policy,
        example: Any,
        *,
        device: str | torch.device | None = None,
        free: Free | None = None,
    ) -> None:
        check_network(net)
        tensors = tensors_of(example)
        if device is not None:
            net.to(resolve_device(device))
        self.device = device_of(net, device or "cpu")
        tensors = tuple(t.to(self.device) for t in tensors)
        kwargs = arguments(example)[1]
        moved = dict(zip(kwargs, tensors, strict=True)) if kwargs else tensors
        self._cut = cut = cut_stages(net, moved, policy, free)
        self.lengths = cut.lengths
        self.policy = policy
        self.num_exits = policy.num_exits
        unfixed = {place for length in cut.lengths for place in length.at}
        self.inputs = tuple(_input(name, tensor, unfixed) for name, tensor in zip(cut.arguments, tensors, strict=True))
        self._most = CUDA_ROWS if self.device.type == "cuda" else sys.maxsize
        self._exits = tuple(stage.exit for stage in cut.stages)
        self._later = tuple({t.name for s in cut.stages[i + 1 :] for t in s.takes} for i in range(len(cut.stages)))
        self._check(net, moved)

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
            InputError: inputs of the wrong number, names, shape or dtype, or the wrong number of thresholds.
        """
        taken, rows = checked_inputs(inputs, named, self.inputs)
        check_sizes(taken, self.lengths)
        if rows > self._most:
            parts = [slice(start, start + self._most) for start in range(0, rows, self._most)]
            given = thresholds_of_parts(thresholds, parts, rows)
            return concatenated(
                [
                    self(*(x[part] for x in taken.values()), thresholds=own)
                    for part, own in zip(parts, given, strict=True)
                ]
            )
        used = self.policy.thresholds
        if not none_given(thresholds, rows):
            remedy = "make an engine with a threshold there"
            used = call_thresholds(thresholds, self.policy, where="this engine", remedy=remedy)
            check_lengths([len(t) for t in used if isinstance(t, np.ndarray)], rows)
        if not rows:
            tail = self._cut.output_shape
            output, label = np.empty((0, *tail), np.float32), np.empty((0, *tail[1:]), np.int64)
            return Prediction(label, np.empty(0, np.int64), np.empty(0, np.float32), output)
        limits = [
            torch.from_numpy(t.copy()).to(self.device) if isinstance(t, np.ndarray) else as_deployed([t]).item()
            for t in used
            if t is not None
        ]
        with torch.inference_mode():
            output, score, exit = self._answer([_tensor(given).to(self.device) for given in taken.values()], limits)
            return Prediction(*(t.cpu().numpy() for t in (output.argmax(dim=1), exit, score, output)))

    def _answer(self, inputs: Sequence[Tensor], thresholds: Sequence[float | Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return every sample's (output, score, exit), given the thresholds of the enabled exits except the last."""
        held = {name: (tensor, 0) for name, tensor in zip(self._cut.inputs, inputs, strict=True)}
        left: list[Tensor | None] = [None]  # the remaining rows after each narrowing of the batch; None for all
        rows = len(inputs[0])
        answer: tuple[Tensor, Tensor, Tensor] | None = None
        for stage, later, threshold in zip(self._cut.stages, self._later, (*thresholds, None), strict=True):
            for taken in stage.takes:
                held[taken.name] = _pick(*held[taken.name], taken.axis, left)
            output, score, *given = stage.module(rows, *(held[taken.name][0] for taken in stage.takes))
            held.update((name, (value, len(left) - 1)) for name, value in zip(stage.gives, given, strict=True))
            held = {name: value for name, value in held.items() if name in later}
            del given  # free the larger batch before later stages run
            answer = _put_back(answer, output, score, stage.exit, left[0])
            if threshold is None:
                break
            if isinstance(threshold, Tensor) and len(threshold) > 1 and left[0] is not None:
                threshold = threshold.index_select(0, left[0])
            deeper = stays(score, threshold).nonzero().squeeze(1)
            if not len(deeper):
                break
            if len(deeper) < rows:
                rows = len(deeper)
                left = [deeper if picked is None else picked.index_select(0, deeper) for picked in left] + [None]
        assert answer is not None
        return answer

    def _check(self, net: nn.Module, example: Any) -> None:
        """Compare each exit, then a mix of exits, with the network on each row alone. Raise `GraphError`."""
        alone = [exit.numpy() for exit in answers_alone(net, example, 4)]
        expected = np.stack(alone, axis=1)
        inputs = [t[: len(expected)] for t in tensors_of(example)]
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


def _tensor(given: NDArray[Any] | Tensor) -> Tensor:
    if isinstance(given, Tensor):
        return given
    if not given.flags.writeable or min(given.strides) < 0:  # torch accepts neither
        given = given.copy()
    return torch.from_numpy(given)


def _pick(value: Tensor, narrowing: int, axis: int | None, left: Sequence[Tensor | None]) -> tuple[Tensor, int]:
    """Return the remaining rows of a value that has the rows of a narrowing, and its new narrowing."""
    rows = left[narrowing]
    if axis is None or rows is None:
        return value, narrowing
    return value.index_select(axis, rows), len(left) - 1


def _put_back(
    answer: tuple[Tensor, Tensor, Tensor] | None, output: Tensor, score: Tensor, exit: int, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Write one exit's outputs into the batch's (output, score, exit) at `rows`; None for all rows."""
    if answer is None or rows is None:
        exits = torch.full_like(score, exit, dtype=torch.int64)
        # An output may be a view of an input or a parameter; later exits write to it.
        return output.clone(memory_format=torch.contiguous_format), score.clone(), exits
    outputs, scores, exits = answer
    return outputs.index_copy_(0, rows, output), scores.index_copy_(0, rows, score), exits.index_fill_(0, rows, exit)
