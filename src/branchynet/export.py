"""Writing a network as one ONNX file, checked against PyTorch before it gets its name."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import scores
from .engine.onnx import FORMAT, METADATA_KEY, load
from .errors import GraphError, InputError
from .files import replacing
from .graph.flat import FlatGraph, flatten, tensors_of
from .graph.onnx_exits import flat_model, nest
from .net import BranchyNet, arguments, evaluating, tensor_of
from .types import Policy
from .version import __version__


def export(
    net: nn.Module,
    path: str | os.PathLike[str],
    *,
    policy: Policy | None,
    example: Any,
    thresholds: Literal["default", "input"] = "default",
    batch: Literal["dynamic", 1] = "dynamic",
    labels: Sequence[str] = (),
    preprocessing: Mapping[str, Any] | None = None,
    promise: str | None = None,
) -> Path:
    """Write a network with its early exits inside one ONNX file.

    The file's inputs are the network's own and one ``threshold_n`` (1,) float32 for each enabled exit but the last; its
    outputs are ``label``, ``exit`` (from 1), ``score`` and ``output``, as in `Prediction`. It is compared with the
    PyTorch network on `example`, exit by exit, before it is renamed into place.

    Args:
        net: a `BranchyNet`; with ``policy=None`` any network.
        path: where to write.
        policy: score and thresholds. None writes the network flat: every exit's output, none of them early
            (``label``, then ``output``, or ``output_1..N`` where there are several), with the same graph treatment.
        example: one batch of inputs: a tensor, a tuple of tensors, or a dict of keyword arguments. With two rows or
            more, a network whose answer to one sample depends on the others is refused.
        thresholds: ``"default"`` makes thresholds inputs with default values, which a caller may omit; ``"input"``
            makes them required inputs, for runtimes that drop inputs with defaults.
        batch: leave the batch size free, or fix it at 1 for the smallest overhead a sample.
        labels: class names, kept in the file's metadata.
        preprocessing: how to make the input, kept likewise, such as ``{"size": [28, 28], "mode": "L", "scale": 1 /
            255}``.
        promise: a sentence on what the thresholds promise, kept likewise.

    Raises:
        InputError: a number of thresholds other than N-1, an unknown score or option.
        GraphError: the network cannot be exported or cut, or the file disagrees with PyTorch.
        FileError: the file cannot be written; nothing is left half-written under `path`.
    """
    if thresholds not in ("default", "input") or batch not in ("dynamic", 1):
        raise InputError(
            f"thresholds must be 'default' or 'input' and batch 'dynamic' or 1; got {thresholds!r}, {batch!r}"
        )
    exits = net.exits if isinstance(net, BranchyNet) else 1
    if policy is not None and policy.exits != exits:
        raise InputError(f"the policy has {len(policy.thresholds)} thresholds; {exits} exits need {exits - 1}")
    score = None if policy is None else scores.resolve(policy.score)
    flat = flatten(net, example, score=score, dynamic=batch == "dynamic")
    notes = {"labels": list(labels), "preprocessing": preprocessing, "promise": promise}
    model = assemble(flat, policy, thresholds=thresholds, notes=notes)
    with replacing(path) as temporary:
        ir.save(model, temporary)
        _compare(net, temporary, policy, example)
    return Path(path)


def assemble(
    flat: FlatGraph,
    policy: Policy | None,
    *,
    thresholds: str = "default",
    outputs: Sequence[str] = (),
    notes: Mapping[str, Any] | None = None,
) -> ir.Model:
    """The finished model of a flat graph, with what an engine must know in its metadata.

    Args:
        flat: with scores where there is a policy.
        policy: None for a flat model.
        thresholds: ``"default"`` or ``"input"``.
        outputs: for a flat model, which of the flat graph's outputs to keep (all exits' by default); the first that is
            an exit's output gets the ``label`` where they are named, else the last.
        notes: labels, preprocessing and promise, as `export` takes them.
    """
    if policy is None:
        kept = list(outputs) or [f"output_{n}" for n in range(1, flat.exits + 1)]
        model = flat_model(flat, kept, kept[0] if outputs else kept[-1])
    else:
        model = nest(flat, policy, thresholds=thresholds)
    shape = flat.value("output_1").shape
    assert shape is not None
    about = {
        "format": FORMAT,
        "version": __version__,
        "policy": None if policy is None else policy.to_json(),
        "exits": flat.exits,
        "thresholds": thresholds,
        "batch": "dynamic" if flat.dynamic else 1,
        "output_shape": [d if isinstance(d, int) else 0 for d in list(shape)[1:]],
        "labels": [],
        "preprocessing": None,
        "promise": None,
    }
    model.metadata_props[METADATA_KEY] = json.dumps({**about, **(notes or {})})
    return model


def _compare(net: nn.Module, path: Path, policy: Policy | None, example: Any) -> None:
    """Each exit in turn, by samples alone and by batches, then samples that part, against the PyTorch network.

    Raises:
        GraphError: they disagree.
    """
    engine = load(path, threads=1)
    expected = _row_by_row(net, example, limit=8)
    inputs = [t[: len(expected[0])].numpy() for t in tensors_of(example)]
    alone = [slice(row, row + 1) for row in range(len(expected[0]))]
    if policy is None:
        for n, want in enumerate(expected, 1):
            for rows in alone:
                _check(engine.outputs(*(i[rows] for i in inputs))[n], want[rows], n)
        return
    dynamic = engine.metadata["batch"] == "dynamic"
    for n in (n for n, enabled in enumerate(policy.enabled, 1) if enabled):
        forced = [None if t is None or k < n else 3e38 for k, t in enumerate(policy.thresholds, 1)]
        for rows in [*alone, slice(None)] if dynamic else alone:
            answer = engine(*(i[rows] for i in inputs), thresholds=forced)
            if (answer.exit != n).any():
                raise GraphError(f"the exported graph leaves at exits {answer.exit} where exit {n} was asked for")
            _check(answer.output, expected[n - 1][rows], n)
    if dynamic:
        score = scores.resolve(policy.score)
        halves = [float(score(expected[:n]).median()) for n in range(1, policy.exits)]
        mixed = [None if t is None else half for t, half in zip(policy.thresholds, halves, strict=True)]
        answer = engine(*inputs, thresholds=mixed)
        for row, n in enumerate(answer.exit):
            _check(answer.output[row : row + 1], expected[n - 1][row : row + 1], n)


@torch.no_grad()
def _row_by_row(net: nn.Module, example: Any, limit: int) -> tuple[Tensor, ...]:
    """Every exit's output for the first rows of the example, each row answered alone."""
    args, kwargs = arguments(example)
    rows = []
    with evaluating(net):
        for i in range(min(len(tensors_of(example)[0]), limit)):
            outputs = net(*(t[i : i + 1] for t in args), **{k: t[i : i + 1] for k, t in kwargs.items()})
            rows.append(outputs if isinstance(net, BranchyNet) else (tensor_of(outputs, "the network's output"),))
    return tuple(torch.cat(exit).float() for exit in zip(*rows, strict=True))


def _check(got: NDArray[Any], want: Tensor, exit: int) -> None:
    expected = want.numpy()
    tolerance = 1e-3 * max(1.0, float(np.abs(expected).max()))
    difference = float(np.abs(got - expected).max())
    if not difference <= tolerance:
        raise GraphError(
            f"the exported graph differs from the network by {difference:.3g} at exit {exit} "
            f"(allowed {tolerance:.3g}); "
            "does its forward depend on values, on random numbers, or on other samples of the batch?"
        )
