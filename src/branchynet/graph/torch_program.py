"""Export a PyTorch network to one torch program with every exit's output and score, or explain why that fails."""

import contextlib
import inspect
import io
import logging
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..argument_checks import described
from ..errors import GraphError, InputError
from ..nn.calls import arguments, evaluating
from ..nn.checks import KEEP_PARAMETERS, calling, changed, written
from ..nn.network import exit_outputs
from ..nn.trace import Trace
from ..nn.unsupported import check_weights
from ..policy.scores import Score
from .free_lengths import Watch
from .onnx_builder import BATCH

# Folders of code that does not belong to the network.
NOT_THE_NETWORKS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))

_TURNS = threading.RLock()

# The largest batch that convolutions and pooling export with on a GPU: the second side of a CUDA grid.
CUDA_ROWS = 65_535


@dataclass(frozen=True, eq=False)
class Program:
    """An exported program.

    Attributes:
        exported: a functional program; it returns every exit's output, then, with scores, every exit's score.
        num_exits: N.
        kinds: ``("output",)``, or ``("output", "score")``.
        dynamic_shapes: the shapes of the inputs in the form of `torch.export`, with the names of free lengths.
        whole: the exported module.
        watch: has watched the export.
    """

    exported: torch.export.ExportedProgram
    num_exits: int
    kinds: tuple[str, ...]
    dynamic_shapes: Any
    whole: nn.Module
    watch: Watch


def tensors_of(example: Any) -> tuple[Tensor, ...]:
    """Return the tensors of an example, positional ones first. Raises `InputError` unless they are one batch."""
    args, kwargs = arguments(example)
    tensors = (*args, *kwargs.values())
    if not tensors or not all(isinstance(t, Tensor) and t.dim() > 0 and len(t) for t in tensors):
        raise InputError(
            "example must be a tensor, or a tuple or dict of tensors, each with a leading batch dimension; got "
            + (", ".join(described(t) for t in tensors) or "nothing")
        )
    if len({len(t) for t in tensors}) > 1:
        raise InputError(f"the tensors of the example have batch sizes {[len(t) for t in tensors]}; they must agree")
    return tuple(t.detach() for t in tensors)


def program_of(
    net: nn.Module,
    example: Any,
    *,
    score: Score | None,
    dynamic: bool = True,
    axes: Sequence[Mapping[int, str]] = (),
) -> Program:
    """Export a network in eval mode, after a normal forward pass, which reveals most mistakes early.

    Args:
        net: a `BranchyNet`, or any network; see `branchynet.nn.network.exit_outputs` for which outputs are exits.
        example: one batch of inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
        score: the score to compute for every exit.
        dynamic: whether the batch size is free; otherwise it is fixed at 1.
        axes: for every input, its other free dimensions with the names of their lengths.

    Raises:
        InputError: the example holds no tensors with a leading batch dimension, or `score` does not return one number
            per sample.
        GraphError: see `check_weights`; the network cannot be exported (the message names module and line if known),
            fixes the batch size, behaves as in training even in eval mode, or has an exit that depends on the last one.
    """
    check_weights(net)
    _check_no_target(net, example)
    rows = 2 if dynamic else 1  # torch treats a batch of 1 as a constant
    tensors = tuple(_rows(t, rows) for t in tensors_of(example))
    most = CUDA_ROWS if any(t.is_cuda for t in tensors) else None
    free = {0: torch.export.Dim(BATCH, max=most)} if dynamic else None
    shapes = named = (tuple(free for _ in tensors),)
    if axes and free:
        shapes = (tuple({**free, **dict.fromkeys(lengths, torch.export.Dim.AUTO)} for lengths in axes),)
        named = (tuple({**free, **{n: torch.export.Dim(name) for n, name in one.items()}} for one in axes),)
    watch = Watch()
    kinds = ("output",) if score is None else ("output", "score")
    with quiet_export(), evaluating(net), torch.no_grad():
        whole = AllExits(net, score, tuple(arguments(example)[1])).eval()
        exits = _rehearse(whole, tensors, len(kinds), example)
        _check_unchanged(whole, tensors)
        try:
            with watch.on() if axes else contextlib.nullcontext():
                exported = torch.export.export(whole, tensors, dynamic_shapes=shapes if dynamic else None, strict=False)
        except (GraphError, InputError):
            raise
        except Exception as error:  # torch passes on any error of the network's code
            raise GraphError(export_failure(error, whole, net)) from error
    _check_no_batch_statistics(exported)
    return Program(exported, exits, kinds, named if dynamic else None, whole, watch)


def _check_no_target(net: nn.Module, example: Any) -> None:
    """Raise `InputError` for labels among the inputs, which would become an input of the file."""
    read = inspect.signature(getattr(net, "backbone", net).forward).parameters
    for name in sorted(arguments(example)[1].keys() & {"labels", "label", "label_ids"}):
        if name in read and read[name].default is None:  # without a default, the network needs labels
            raise InputError(
                f"the example holds {name!r}, which the network reads only to compute its loss: leave it out, "
                f"{{k: v for k, v in batch.items() if k != {name!r}}}"
            )


class AllExits(nn.Module):
    """Return all outputs, then all scores, in one tuple. The last positional inputs become keyword arguments."""

    def __init__(self, net: nn.Module, score: Score | None, keywords: tuple[str, ...]) -> None:
        super().__init__()
        self.net = net
        self.score = score
        self.keywords = keywords

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return every exit's output, then every exit's score if there is a score."""
        positional = len(inputs) - len(self.keywords)
        returned = self.net(*inputs[:positional], **dict(zip(self.keywords, inputs[positional:], strict=True)))
        outputs = exit_outputs(self.net, returned)
        for n, output in enumerate(outputs, 1):
            if output.dim() < 2 or output.shape[1:] != outputs[-1].shape[1:]:
                raise GraphError(
                    f"exit {n} gives shape {tuple(output.shape)} and the last exit {tuple(outputs[-1].shape)}; "
                    "all exits must give (B, C, ...) of one shape: give every branch the shape of the backbone's "
                    "output, and one number per sample as (B, 1)"
                )
        outputs = tuple(output.float() for output in outputs)
        if self.score is None:
            return outputs
        scores = [self.score(outputs[: n + 1]) for n in range(len(outputs))]
        for n, (score, output) in enumerate(zip(scores, outputs, strict=True), 1):
            if not isinstance(score, Tensor) or score.shape != output.shape[:1]:
                given = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
                raise InputError(
                    f"the score gives {given} for output {tuple(output.shape)} at exit {n}; it must give one number "
                    "per sample, (B,): reduce the other dimensions in a callable"
                )
        return (*outputs, *(score.float() for score in scores))


def _rehearse(whole: AllExits, tensors: tuple[Tensor, ...], kinds: int, example: Any) -> int:
    """Count the exits in a forward pass. Raise `GraphError` for an exit that is computed from the last one."""
    survey = Trace((), tensors)
    with survey, calling(whole.net, example):
        results = whole(*tensors)
    exits = len(results) // kinds
    last = survey.node(results[exits - 1])
    for n, output in enumerate(results[: exits - 1], 1):
        if survey.node(output) != last and last in survey.needed_until(survey.node(output)):
            raise GraphError(
                f"exit {n} is computed from the last exit's output, so leaving there could save nothing; tap a "
                "submodule that runs before the output"
            )
    return exits


def _rows(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor] * rows)[:rows] if tensor.shape[0] < rows else tensor[:rows]


def export_failure(error: Exception, whole: nn.Module, net: nn.Module) -> str:
    """Say what failed, in which module and at which line of the network's code."""
    names = {id(module): (name, module) for name, module in whole.named_modules()}
    place = line = ""
    module: nn.Module = whole
    for frame, number in traceback.walk_tb(error.__traceback__):
        name, module = names.get(id(frame.f_locals.get("self")), ("", whole))
        if readable_path(name):
            place = f"{readable_path(name)!r} ({type(module).__name__})"
        if not frame.f_code.co_filename.startswith((*NOT_THE_NETWORKS, "<")):
            line = f"{frame.f_code.co_filename}:{number}"
    lines = [text.strip(" -") for text in str(error).splitlines() if text.strip()] or [type(error).__name__]
    cause = lines[0]
    if cause.startswith("Constraints violated"):
        cause = (
            f"the batch size, dimension 0 of every input, cannot stay free ({lines[1]}); write the batch as x.shape[0] "
            "or -1 in shapes and do not compare it, or export with free='none'"
        )
        place = line = ""
    elif isinstance(module, torch.jit.ScriptModule):
        cause += "; TorchScript cannot be exported: give the nn.Module that it was made of"
    elif "data-dependent" in cause:
        cause += "; its control flow depends on a tensor's values: write that with torch.where"
    at = f" (in {place} at {line})" if place and line else f" (at {line})" if line else ""
    return f"{type(net).__name__} cannot be exported{at}: {cause}"


def readable_path(path: str) -> str:
    """Convert a path in the exported wrapper to a path in the user's network."""
    return path.removeprefix("net").removeprefix(".").removeprefix("backbone.")


def place_of_module(whole: nn.Module, module: nn.Module | None) -> str:
    """Name a module of the exported wrapper, such as ``'embeddings' (Embeddings)``."""
    path = readable_path(next((name for name, one in whole.named_modules() if one is module), ""))
    return f"{path!r} ({type(module).__name__})" if path else "the network's own forward"


def _check_unchanged(whole: nn.Module, tensors: tuple[Tensor, ...]) -> None:
    """Raise `GraphError` if a forward pass changes parameters or buffers; some networks create these in the first pass.

    Parameters may be too large to copy, so only their counts of writes are compared.
    """
    parameters = written(whole.named_parameters())
    before, values = written(whole.named_buffers()), {name: buffer.clone() for name, buffer in whole.named_buffers()}
    whole(*tensors)
    if (name := changed(parameters, written(whole.named_parameters()))) is not None:
        raise GraphError(
            f"the network changes its parameter {readable_path(name)!r} in a forward pass, so its outputs would "
            f"depend on earlier calls: {KEEP_PARAMETERS}"
        )
    for name, (buffer, writes) in written(whole.named_buffers()).items():
        then = before.get(name, (None, 0))
        # Writes through .data are not counted, but change the values; NaN differs from itself.
        if then[0] is not buffer or then[1] != writes or (buffer != values[name]).logical_and(buffer == buffer).any():
            raise GraphError(
                f"the network changes its buffer {readable_path(name)!r} in a forward pass, so its outputs would "
                "depend on earlier calls: is a batch norm in training mode? change buffers only under `if "
                "self.training:`"
            )


def _check_no_batch_statistics(exported: torch.export.ExportedProgram) -> None:
    """Raise `GraphError` for a batch norm that averages over the samples of a batch, as in training."""
    for node in exported.graph.nodes:
        name = name_of(node)
        trains = name == "_native_batch_norm_legit" or (name == "batch_norm" and argument_of(node, "training"))
        if trains and any(isinstance(d, torch.SymInt) for d in node.args[0].meta["val"].shape):  # else weights
            modules = [readable_path(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
            place = next((path for path in reversed(modules) if path), "the network")
            raise GraphError(
                f"a batch norm in {place!r} averages over the samples of a batch, as in training; use running "
                "statistics in eval mode"
            )


def name_of(node: fx.Node) -> str:
    """Return the operator that a node calls, such as ``conv2d``; the node's name if it calls none."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.removeprefix("aten::")
    return getattr(target, "__name__", node.name)


def argument_of(node: fx.Node, name: str) -> Any:
    """Return the value of an operator's argument in a node."""
    for place, argument in enumerate(getattr(node.target, "_schema").arguments):  # noqa: B009  # not typed
        if argument.name == name:
            return node.args[place] if place < len(node.args) else node.kwargs.get(name, argument.default_value)
    return None


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Silence torch's notices about missing packages, deprecations and retries. Errors still propagate.

    Threads take turns, because torch.export and the redirection of the streams change the state of the whole process.
    """
    with _TURNS, _silenced():
        yield


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx.experimental.symbolic_shapes", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        aside = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(aside), contextlib.redirect_stderr(aside):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
