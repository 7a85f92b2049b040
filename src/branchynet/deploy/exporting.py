"""Write a network as one ONNX file, after a comparison with PyTorch."""

import contextlib
import copy
import importlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from ..argument_checks import instance, whole
from ..environment import require
from ..errors import GraphError, InputError, as_graph_errors, first_line
from ..extras import needed_by
from ..files import check_path, check_utf8, replacing
from ..folders import remove_weights, replacing_folder, replacing_with_weights
from ..graph.free_lengths import Free
from ..graph.free_program import own_names
from ..graph.half import HALF
from ..graph.onnx_flat import FlatGraph, flatten
from ..graph.precision import Precision, check_precision
from ..graph.quantize import calibration_batches
from ..graph.table_lengths import resized
from ..graph.torch_program import tensors_of
from ..nn.calls import arguments
from ..nn.checks import check_network
from ..nn.fingerprint import fingerprint
from ..nn.network import check_policy
from ..nn.output_warnings import warn_of_probabilities
from ..policy.exit_record import check_same_network
from ..policy.record_scores import is_named
from ..policy.scores import Score, resolve
from ..policy.values import Choice, Policy
from .assembly import assemble, check_answers, in_precision, warn_of_low_agreement
from .loading import Runtime
from .model_file import is_large, save_model
from .reference_outputs import answers_alone
from .staged_files import MANIFEST, STAGE_FILES
from .staged_writing import save_stages
from .stored_samples import MAX_SAMPLES, SAMPLES_KEY, Samples, pack
from .tolerance import differences, tolerances
from .user_metadata import class_names, plain_values


def export(
    net: nn.Module,
    path: str | os.PathLike[str],
    *,
    policy: Policy | Choice | None,
    example: Any,
    thresholds: Literal["default", "input"] = "default",
    free: Literal["batch", "none"] | Free = "batch",
    precision: Precision = "float32",
    calibration: Any = None,
    labels: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    samples: int = MAX_SAMPLES,
    layout: Literal["nested", "stages"] = "nested",
) -> Path:
    """Write a network with its early exits as one ONNX file, or as one file per stage.

    The file's inputs are the network's inputs and one ``threshold_n`` (1,) float32 per enabled exit except the last.
    Its outputs are ``label``, ``exit`` (from 1), ``score`` and ``output``, as in `Prediction`. The file is compared
    with the PyTorch network on `example`, exit by exit, before it is renamed to `path`. It ends with a checksum that
    `load` compares. Weights beyond 2 GB go to a second file beside it, ``NAME.HASH.weights``, which belongs to it.

    Args:
        net: a `BranchyNet`, or a network that returns a tuple of its exits' outputs; with ``policy=None`` any network.
        path: the file to write.
        policy: score and thresholds, or a `Choice`, which also gives its promise and names its record in the metadata.
            None writes a flat file, without early exits: ``label``, then ``output``, or ``output_1..N`` for several.
        example: one batch of inputs: a tensor, a tuple of tensors, or a dict of keyword arguments. Give at least two
            rows, so that a network that mixes the samples of a batch is refused.
        thresholds: ``"default"``: the thresholds are inputs with default values, which a caller may omit;
            ``"input"``: they are required inputs, for runtimes that drop inputs with defaults.
        free: which dimensions of the inputs may differ from the example. ``"batch"``: the batch size. ``"none"``: none;
            the file takes one sample per call, with the smallest overhead. A mapping from names of inputs to dimensions
            also frees these lengths, such as ``{"input_ids": {1: "length"}, "attention_mask": {1: "length"}}``;
            dimensions of one name have one size. The sizes that the file takes are in `Engine.lengths`.
        precision: ``"fp16"`` and ``"bf16"`` halve the weights; a file in bf16 needs OpenVINO, here too, or a GPU.
            ``"int8"`` computes convolutions and matrix products in 8 bits. Inputs, outputs and scores stay float32. The
            file is compared with PyTorch before conversion and with the flat converted graph after it. The converted
            network needs its own thresholds: choose them on a `record` of a flat file of this precision. The metadata
            holds the share of the samples in which it agrees with float32. ``"int8"`` uses 7 of a weight's 8 bits, so
            that every processor computes the same; ``"int8-full-range"`` uses all 8 and is wrong on x86 processors
            without VNNI, because 16-bit sums saturate.
        calibration: for int8, a loader of inputs or `(inputs, target)` batches: a few hundred training samples, held
            in memory, which give the ranges of all values. The same samples give the same network. For fp16 and bf16
            optional: the samples to compare with float32 and to look for values that are too large; by default
            `example`.
        labels: class names, for the metadata.
        preprocessing: how to make the input, for the metadata, such as ``{"size": [28, 28], "mode": "L", "scale": 1 /
            255}``. ``branchynet predict`` reads ``mean`` and ``std``: one number per channel, of pixels in [0, 1].
        samples: number of rows of `example`, at most 8 and about 1 MiB, to store with their outputs, so that `verify`
            and ``load(..., verify=True)`` can check the file on another machine; 0 for none.
        layout: ``"nested"`` writes one file, which runs in every ONNX runtime that has ``If``. ``"stages"`` writes a
            folder with ``stage_1.onnx``, ... and ``stages.json``, for schedulers, for networks split over machines, and
            for runtimes without ``If``; see `StagedEngine`. Its thresholds are in ``stages.json`` and come with each
            call, also per sample.

    Returns:
        `path`.

    Raises:
        InputError: a number of thresholds other than N-1, a `Choice` for another network or other weights, an unknown
            score or option, or calibration batches that do not fit the network.
        GraphError: the network cannot be exported, converted or cut, a value is too large for the precision, or the
            file disagrees with PyTorch.
        FileError: the file cannot be written; no partial file remains at `path`.

    Warns:
        UserWarning: the converted network and float agree in less than 95% of the samples; or an input has the name of
            an output or threshold of the file, such as ``label``, and is called ``label_`` there.

    Example:
        >>> import torch
        >>> from branchynet import BranchyNet, Policy, export, load
        >>> from torch import nn
        >>> net = BranchyNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), {"1": nn.Linear(8, 3)})
        >>> path = export(net, "net.onnx", policy=Policy(thresholds=(0.5,)), example=torch.randn(2, 4))
        >>> load(path)(torch.randn(5, 4)).output.shape
        (5, 3)
    """
    check_path(path, "write")
    check_utf8(path)
    samples = whole("samples", samples, 0, MAX_SAMPLES)
    _check_options(thresholds, free, layout, policy)
    check_network(net)
    check_precision(precision, calibration)
    runtime = _checking_runtime(precision)
    kinds = (Policy, Choice, type(None))
    instance("policy", policy, kinds, "give Policy(thresholds=(...)), what choose(...) returns, or None")
    choice = policy if isinstance(policy, Choice) else None
    policy = policy.policy if isinstance(policy, Choice) else policy
    if policy is not None:
        check_policy(policy, net, example)
    notes = _notes(net, choice, precision, labels, preprocessing)
    score = None if policy is None else resolve(policy.score)
    lengths = free if isinstance(free, Mapping) else None
    flat = flatten(net, example, score=score, dynamic=free != "none", free=lengths)
    _warn_of_other_names(net, example, flat)
    expected, source = _from_network(net, example, score), "the network"
    _check_outputs(expected, notes["labels"], policy)
    if precision != "float32":
        given = [tuple(tensors_of(example))] if calibration is None else calibration
        flat, expected, report = in_precision(flat, calibration_batches(given, flat), precision, expected)
        notes["precision"], source = {"scheme": precision, **report}, f"its flat {precision.partition('-')[0]} graph"
        warn_of_low_agreement(precision, report["agreement"])
    kept = [n for n in range(1, flat.num_exits + 1) if policy is None or policy.enabled[n - 1]]
    stored = pack(expected, kept, samples)
    model = None if layout == "stages" else assemble(flat, policy, thresholds=thresholds, notes=notes)
    with _placed(path, model) as temporary:
        if model is None:
            assert policy is not None
            save_stages(temporary, flat, policy, notes=notes, samples=stored)
        else:
            if stored:
                model.metadata_props[SAMPLES_KEY] = stored
            save_model(model, temporary)
        with _magnification_named(net, example, expected, precision), as_graph_errors():
            check_answers(temporary, expected, source, runtime=runtime, strict=precision not in HALF)
            if flat.lengths and precision == "float32":
                check_answers(temporary, _at_other_lengths(net, example, score, flat), source)
    return Path(path)


def _checking_runtime(precision: str) -> Runtime:
    """Return the runtime that the file is compared in: ONNX Runtime cannot compute bf16 on the CPU."""
    if precision != "bf16":
        return "onnxruntime"
    with needed_by("precision='bf16'", extra="openvino"):
        require("openvino")
        importlib.import_module("openvino")
    return "openvino"


def _notes(
    net: nn.Module, choice: Choice | None, precision: str, labels: Sequence[str] | None, preprocessing: Any
) -> dict[str, Any]:
    """Return what the metadata say of the network, its thresholds and its inputs."""
    network = fingerprint(net) + ("" if precision == "float32" else f"-{precision}")
    notes = {
        "network": network,
        "labels": class_names(labels),
        "preprocessing": plain_values(preprocessing),
        "promise": None,
        "selected_on": list(getattr(net, "selected_on", ())),
    }
    if choice is not None:
        check_same_network("the network and the choice", network, choice.network)
        notes |= {"chosen_on": choice.record_digest, "promise": _promise_of(choice)}
    return notes


def _check_outputs(expected: Samples, labels: Sequence[str], policy: Policy | None) -> None:
    """Raise `InputError` for labels of another number of classes, and warn of outputs that look like probabilities."""
    classes = expected.outputs[-1].shape[1]
    if labels and len(labels) != classes:
        raise InputError(f"labels= names {len(labels)} classes, but every exit has {classes} outputs; give {classes}")
    if len(expected.outputs) > 1 and (policy is None or is_named(policy.score)):
        warn_of_probabilities(tuple(torch.from_numpy(o) for o in expected.outputs), level=4)


def _warn_of_other_names(net: nn.Module, example: Any, flat: FlatGraph) -> None:
    """Warn of inputs that have another name in the file, because it uses theirs."""
    args, kwargs = arguments(example)
    pairs = zip(own_names(net, len(args), tuple(kwargs)), flat.model.graph.inputs, strict=True)
    if other := [f"{own!r} as {value.name!r}" for own, value in pairs if own != value.name]:
        warnings.warn(
            f"the file has the input {', '.join(other)}, because it uses the network's name itself: call the engine "
            "by that name, or rename the parameter of forward",
            stacklevel=3,
        )


def _check_options(thresholds: Any, free: Any, layout: Any, policy: Any) -> None:
    if thresholds not in ("default", "input") or layout not in ("nested", "stages"):
        raise InputError(
            "thresholds must be 'default' or 'input', and layout 'nested' or 'stages'; got "
            f"{thresholds!r} and {layout!r}"
        )
    if not isinstance(free, Mapping) and free not in ("batch", "none"):
        raise InputError(
            "free must be 'batch', 'none', or a mapping from inputs to dimensions, such as {'x': {1: 'length'}}; got "
            f"{free!r}"
        )
    if layout == "stages" and (policy is None or thresholds == "input" or free == "none"):
        raise InputError(
            "layout='stages' needs a policy, and takes thresholds and batches of any size with each call; leave "
            f"thresholds='default' and free='batch'; got policy={policy!r}, {thresholds!r} and {free!r}"
        )


@contextlib.contextmanager
def _placed(path: str | os.PathLike[str], model: ir.Model | None) -> Iterator[Path]:
    """Yield a temporary path for a model, or without one for a folder, and give it its name if the block succeeds."""
    if model is not None and is_large(model):
        with replacing_with_weights(path) as temporary:
            yield temporary
        return
    with replacing_folder(path, MANIFEST, STAGE_FILES) if model is None else replacing(path) as temporary:
        yield temporary
    if model is not None:
        remove_weights(path)


def _promise_of(choice: Choice) -> str:
    """Return what the thresholds promise, or that they promise nothing."""
    if choice.promise is not None:
        return str(choice.promise)
    limits = ", ".join(f"{limit} {value:g}" for limit, value in choice.constraint.items())
    return f"none; chosen for {limits} on {choice.outcome.samples} validation samples"


@torch.no_grad()
def _from_network(net: nn.Module, example: Any, score: Score | None) -> Samples:
    """Return the PyTorch network's outputs for the first rows of the example, each row alone."""
    given = tuple(t[:MAX_SAMPLES].numpy() for t in tensors_of(example))
    outputs = answers_alone(net, example, MAX_SAMPLES)
    scores = () if score is None else tuple(score(outputs[:n]).numpy() for n in range(1, len(outputs) + 1))
    for n, output in enumerate(outputs, 1):
        if output.isnan().any():
            row = int(output.flatten(1).isnan().any(dim=1).nonzero()[0])
            raise GraphError(
                f"exit {n} gives NaN for row {row} of the example, so the file cannot be compared with the network: "
                "give an example of real inputs, or look for NaN among the weights"
            )
    arrays, slack = tuple(o.numpy() for o in outputs), np.zeros((len(outputs), 1))
    return Samples(given, arrays, scores, slack, (0.0,) * len(outputs))


def _at_other_lengths(net: nn.Module, example: Any, score: Score | None, flat: FlatGraph) -> Samples:
    """Return the network's outputs for the example with other lengths."""
    names = [str(value.name) for value in flat.model.graph.inputs]
    other = resized(example, names, {length: length.other() for length in flat.lengths})
    sizes = ", ".join(f"{length.name} {length.other()}" for length in flat.lengths)
    try:
        return _from_network(net, other, score)
    except Exception as error:  # of the network's code
        raise GraphError(
            f"the network fails with {sizes}: {first_line(error)}; leave that length out of free, or give an example "
            "that can be cut or repeated to it"
        ) from error


@contextlib.contextmanager
def _magnification_named(net: nn.Module, example: Any, expected: Samples, precision: str) -> Iterator[None]:
    """Add to a `GraphError` that the network itself magnifies rounding, if it does."""
    try:
        yield
    except GraphError as error:
        if precision != "float32" or not (reason := _magnified(net, example, expected)):
            raise
        raise GraphError(f"{error}{reason}") from error


def _magnified(net: nn.Module, example: Any, expected: Samples) -> str:
    """Return a hint for an error if the network's own outputs differ in float64, else an empty string."""
    args, kwargs = arguments(example)
    exact = {name: t.double() if t.is_floating_point() else t for name, t in (*enumerate(args), *kwargs.items())}
    try:
        twin = copy.deepcopy(net).double()
        want = _from_network(twin, {k: exact[k] for k in kwargs} if kwargs else tuple(exact.values()), None).outputs
    except Exception:  # some networks cannot be copied, or hold float32 constants
        return ""
    offs = [differences(a, b) for a, b in zip(expected.outputs, want, strict=True)]
    beyond = [float((off / tolerances(b)).max()) for off, b in zip(offs, want, strict=True)]
    n = int(np.argmax(beyond))
    if not beyond[n] > 1:
        return ""
    return (
        f" The network's own outputs in float32 and float64 differ by {offs[n].max():.3g} (exit {n + 1}): it "
        "magnifies rounding, so no two runtimes agree. Is it trained? Normalize features that hardly differ between "
        "samples"
    )
