"""Writing a network as one ONNX file, checked against PyTorch before it gets its name."""

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from . import scores
from .arguments import instance
from .checking import network
from .engine.checks import difference, differences, magnitude
from .engine.exported import FORMAT, METADATA_KEY, Engine
from .engine.onnx import load
from .engine.samples import MAX_SAMPLES, SAMPLES_KEY, Samples, pack
from .engine.seal import seal
from .engine.verifying import check
from .errors import GraphError, InputError, as_graph_errors
from .exit_record import check_same_network
from .files import replacing
from .fingerprint import fingerprint
from .graph.flat import FlatGraph, flatten, tensors_of
from .graph.layout import keep_blocks
from .graph.memory import sample_bytes
from .graph.onnx_exits import flat_model, nest
from .graph.quantize import Batch, Quantize, calibration_batches, check_quantize, quantized
from .machine import processor
from .net import arguments, count_exits, evaluating, exits_in
from .notes import class_names, plain_values
from .outputs import warn_of_probabilities
from .sureness import Score
from .types import Choice, Policy
from .version import __version__

LOW_AGREEMENT = 0.95  # of int8 with float; the networks of the zoo reach 0.98


def export(
    net: nn.Module,
    path: str | os.PathLike[str],
    *,
    policy: Policy | Choice | None,
    example: Any,
    thresholds: Literal["default", "input"] = "default",
    batch: Literal["dynamic", 1] = "dynamic",
    quantize: Quantize | None = None,
    calibration: Any = None,
    labels: Sequence[str] = (),
    preprocessing: Mapping[str, Any] | None = None,
    promise: str | None = None,
    samples: int = MAX_SAMPLES,
) -> Path:
    """Write a network with its early exits inside one ONNX file.

    The file's inputs are the network's own and one ``threshold_n`` (1,) float32 for each enabled exit but the last; its
    outputs are ``label``, ``exit`` (from 1), ``score`` and ``output``, as in `Prediction`. It is compared with the
    PyTorch network on `example`, exit by exit, before it is renamed into place. It ends in a checksum, which `load`
    compares.

    Args:
        net: a `BranchyNet`, or a network that returns a tuple of its exits' outputs; with ``policy=None`` any network.
        path: where to write.
        policy: score and thresholds. None writes the network flat: every exit's output, none of them early
            (``label``, then ``output``, or ``output_1..N`` where there are several), with the same graph treatment. A
            `Choice` gives its policy and its promise, and the metadata name the record that chose.
        example: one batch of inputs: a tensor, a tuple of tensors, or a dict of keyword arguments. With two rows or
            more, a network whose answer to one sample depends on the others is refused.
        thresholds: ``"default"`` makes thresholds inputs with default values, which a caller may omit; ``"input"``
            makes them required inputs, for runtimes that drop inputs with defaults.
        batch: leave the batch size free, or fix it at 1 for the smallest overhead a sample.
        quantize: ``"int8"`` computes convolutions and matrix products in 8 bits; outputs and scores stay float32. The
            int8 network is another network than the float one: choose its thresholds on its own answers (`record` of a
            flat int8 file). The file is compared with PyTorch before it is quantised and with the flat int8 graph
            after. Its metadata says in what share of the calibration samples int8 and float agree, and a `UserWarning`
            says so where that is less than 95 %. ``"int8"`` uses 7 of a weight's 8 bits, so that the file answers alike
            on every processor; ``"int8-full-range"`` uses all 8 and is wrong on x86 processors without VNNI, where
            16-bit sums saturate.
        calibration: with ``quantize``, a loader of inputs or `(inputs, target)` batches, some hundreds of training
            samples, held in memory; the ranges of all values are taken from them, so that the same samples give the
            same network.
        labels: class names, kept in the file's metadata.
        preprocessing: how to make the input, kept likewise, such as ``{"size": [28, 28], "mode": "L", "scale": 1 /
            255}``. ``branchynet predict`` reads ``mean`` and ``std``: one number per channel, of pixels in [0, 1].
        promise: a sentence on what the thresholds promise, kept likewise; by default that of a `Choice`.
        samples: how many rows of `example`, at most 8 and about 1 MiB, the file holds with their answers, by which
            `verify` and ``load(..., verify=True)`` check it on another machine; 0 for none.

    Raises:
        InputError: a number of thresholds other than N-1, a `Choice` for another network or other weights, an unknown
            score or option, or calibration batches that the network does not read.
        GraphError: the network cannot be exported, quantised or cut, or the file disagrees with PyTorch.
        FileError: the file cannot be written; nothing is left half-written under `path`.
    """
    if not isinstance(samples, Integral) or not 0 <= samples <= MAX_SAMPLES:
        raise InputError(f"samples must be a number of rows to store, 0 to {MAX_SAMPLES}; got {samples!r}")
    if thresholds not in ("default", "input") or batch not in ("dynamic", 1):
        raise InputError(
            f"thresholds must be 'default' or 'input' and batch 'dynamic' or 1; got {thresholds!r}, {batch!r}"
        )
    network(net)
    kinds = (Policy, Choice, type(None))
    instance("policy", policy, kinds, "give Policy(thresholds=(...)), what choose(...) returns, or None")
    notes: dict[str, Any] = {"network": fingerprint(net) + (f"-{quantize}" if quantize else "")}
    notes |= {"labels": class_names(labels), "preprocessing": plain_values(preprocessing), "promise": promise}
    notes |= {"selected_on": list(getattr(net, "selected_on", ()))}
    if isinstance(policy, Choice):
        check_same_network("the network and the choice", notes["network"], policy.network)
        notes["chosen_on"] = policy.record_digest
        notes["promise"] = promise or (policy.promise and str(policy.promise))
        policy = policy.policy
    if policy is not None and policy.exits != (exits := count_exits(net, example)):
        raise InputError(f"the policy has {len(policy.thresholds)} thresholds; {exits} exits need {exits - 1}")
    check_quantize(quantize, calibration)
    score = None if policy is None else scores.resolve(policy.score)
    flat = flatten(net, example, score=score, dynamic=batch == "dynamic")
    expected, source = _from_network(net, example, score), "the network"
    names, classes = notes["labels"], expected.outputs[-1].shape[1]
    if names and len(names) != classes:
        raise InputError(f"labels= names {len(names)} classes, but the exits answer with {classes}; give {classes}")
    if len(expected.outputs) > 1 and (policy is None or scores.is_named(policy.score)):
        warn_of_probabilities(tuple(torch.from_numpy(o) for o in expected.outputs))
    if quantize:
        batches = calibration_batches(calibration, flat)
        flat, expected, report = _in_int8(flat, batches, quantize, expected)
        notes["quantize"], source = {"scheme": quantize, **report}, "its flat int8 graph"
        _warn_of_low_agreement(quantize, report["agreement"])
    model = assemble(flat, policy, thresholds=thresholds, notes=notes)
    kept = [n for n in _exits(flat) if policy is None or policy.enabled[n - 1]]
    if stored := pack(expected, kept, samples):
        model.metadata_props[SAMPLES_KEY] = stored
    with replacing(path) as temporary:
        ir.save(model, temporary)
        seal(temporary)
        try:
            with as_graph_errors():
                _compare(temporary, expected, source)
        except GraphError as error:
            if quantize or not (reason := _magnified(net, example, expected)):
                raise
            raise GraphError(f"{error}{reason}") from error
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
    with as_graph_errors():
        if policy is None:
            kept = list(outputs) or [f"output_{n}" for n in range(1, flat.exits + 1)]
            model = flat_model(flat, kept, kept[0] if outputs else kept[-1])
        else:
            model = nest(flat, policy, thresholds=thresholds)
        keep_blocks(model)
    shape = flat.value("output_1").shape
    assert shape is not None
    about = {
        "format": FORMAT,
        "version": __version__,
        "policy": None if policy is None else policy.to_json(),
        "inputs": [value.name for value in flat.model.graph.inputs],
        "exits": flat.exits,
        "thresholds": thresholds,
        "batch": "dynamic" if flat.dynamic else 1,
        "sample_bytes": sample_bytes(flat),
        "output_shape": [d if isinstance(d, int) else 0 for d in list(shape)[1:]],
        "labels": [],
        "preprocessing": None,
        "promise": None,
    }
    model.metadata_props[METADATA_KEY] = json.dumps({**about, **(notes or {})})
    return model


def _in_int8(
    flat: FlatGraph, batches: Sequence[Batch], quantize: Quantize, expected: Samples
) -> tuple[FlatGraph, Samples, dict[str, Any]]:
    """The graph in int8, what its exits answer for the samples, and how far it agrees with the float graph.

    The float graph is compared with the network first. Two runs of one int8 graph may round a value to neighbouring
    steps, where float operations between differ in the last bit; so the file that is cut from it may be off by as much
    as int8 is off from float on average, far less than a wrong row or a missing node would make.
    """
    int8 = quantized(flat, batches, quantize)
    names = [f"{kind}_{n}" for kind in ("output", "score")[: 1 + bool(expected.scores)] for n in _exits(flat)]
    with tempfile.TemporaryDirectory() as folder, as_graph_errors():
        path = Path(folder) / "flat.onnx"
        ir.save(assemble(flat, None), path)
        _compare(path, expected, "the network")
        ir.save(assemble(flat, None, outputs=names), path)
        exact = load(path)
        ir.save(assemble(int8, None, outputs=names), path)
        rounded = load(path)
        report, slack = _disagreement(exact, rounded, batches)
        rows = [rounded.outputs(*(i[s : s + 1] for i in expected.inputs))[1:] for s in range(len(expected))]
    answers = [np.concatenate(exit) for exit in zip(*rows, strict=True)]
    exits = flat.exits
    return int8, Samples(expected.inputs, tuple(answers[:exits]), tuple(answers[exits:]), *slack), report


def _exits(flat: FlatGraph) -> range:
    return range(1, flat.exits + 1)


def _disagreement(
    exact: Engine, rounded: Engine, batches: Sequence[Batch]
) -> tuple[dict[str, Any], tuple[tuple[float, ...], tuple[float, ...]]]:
    """For every exit, the agreement of both over all samples; and the mean difference of outputs, and of scores.

    Agreement is the share of equal labels, or, where there is one output a sample (regression), the share of the float
    outputs' variance that int8 explains (R^2).
    """
    exits, samples = exact.exits, sum(len(batch[0]) for batch in batches)
    same, difference, error, first, second, scores = np.zeros((6, exits))
    for batch in batches:
        answers = [engine.outputs(*batch)[1:] for engine in (exact, rounded)]
        a, b = (np.stack(answer[:exits]).astype(np.float64) for answer in answers)
        sums = [
            (same, a.argmax(axis=2) == b.argmax(axis=2)),
            (difference, differences(a, b)),
            (error, differences(a, b) ** 2),
            (first, a),
            (second, a**2),
        ]
        if len(answers[0]) > exits:
            sums.append((scores, differences(*(np.stack(answer[exits:]) for answer in answers))))
        for total, value in sums:
            total += len(batch[0]) / samples * value.reshape(exits, -1).mean(axis=1)
    several = exact.metadata["output_shape"][0] > 1
    agreement = same if several else 1 - error / np.maximum(second - first**2, np.finfo(np.float32).tiny)
    report = {"samples": samples, "agreement": agreement.tolist(), "mean_difference": difference.tolist()}
    return report, (tuple(difference.tolist()), tuple(scores.tolist()))


def _warn_of_low_agreement(quantize: Quantize, agreement: Sequence[float]) -> None:
    worst = int(np.argmin(agreement))
    if agreement[worst] >= LOW_AGREEMENT:
        return
    remedy = (
        "give more calibration samples, of the kind that it will see, or export in float"
        if quantize == "int8"
        else "where this processor lacks VNNI, sums of 16 bits saturate: use quantize='int8'"
    )
    warnings.warn(
        f"the {quantize} network agrees with the float network in only {agreement[worst]:.1%} of the calibration "
        f"samples at exit {worst + 1} on this machine ({processor()}); {remedy}",
        stacklevel=3,
    )


def _compare(path: Path, expected: Samples, source: str) -> None:
    """Raises `GraphError` where a file does not answer as expected, in any exit, alone or in a batch."""
    problems = check(load(path, threads=1), expected, strict=True).problems
    if problems:
        raise GraphError(
            f"the exported graph differs from {source}: {problems[0]}; does its forward depend on values, on random "
            "numbers, or on other samples of the batch?"
        )


@torch.no_grad()
def _from_network(net: nn.Module, example: Any, score: Score | None) -> Samples:
    """What the PyTorch network answers for the first rows of the example, each row alone."""
    args, kwargs = arguments(example)
    given = [t[:MAX_SAMPLES] for t in tensors_of(example)]
    rows = []
    with evaluating(net):
        for i in range(len(given[0])):
            outputs = net(*(t[i : i + 1] for t in args), **{k: t[i : i + 1] for k, t in kwargs.items()})
            rows.append(exits_in(net, outputs))
        outputs = tuple(torch.cat(exit).float() for exit in zip(*rows, strict=True))
        found = [] if score is None else [score(outputs[:n]).numpy() for n in range(1, len(outputs) + 1)]
    for n, output in enumerate(outputs, 1):
        if output.isnan().any():
            row = int(output.flatten(1).isnan().any(dim=1).nonzero()[0])
            raise GraphError(
                f"exit {n} gives NaN for row {row} of the example, so that no file could be compared with the network: "
                "give an example of real inputs, or look for NaN among the weights"
            )
    none = (0.0,) * len(outputs)
    return Samples(tuple(t.numpy() for t in given), tuple(o.numpy() for o in outputs), tuple(found), none, none)


def _magnified(net: nn.Module, example: Any, expected: Samples) -> str:
    """What to add to an error where the network itself answers otherwise in float64; nothing where it does not."""
    args, kwargs = arguments(example)
    exact = {name: t.double() if t.is_floating_point() else t for name, t in (*enumerate(args), *kwargs.items())}
    try:
        twin = copy.deepcopy(net).double()
        want = _from_network(twin, {k: exact[k] for k in kwargs} if kwargs else tuple(exact.values()), None).outputs
    except Exception:  # some networks cannot be copied, or hold constants of float32
        return ""
    offs = [difference(a, b) for a, b in zip(expected.outputs, want, strict=True)]
    n = int(np.argmax(offs))
    if not offs[n] > 1e-3 * magnitude(want[n]):
        return ""
    return (
        f" In float64 the network itself answers {offs[n]:.3g} off what it answers in float32 (exit {n + 1}): it "
        "magnifies rounding, so that no two runtimes agree. Is it trained? Normalise features that hardly differ "
        "from sample to sample"
    )
