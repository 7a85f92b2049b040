"""Build the exported ONNX model from a flat graph: convert, cut and nest it."""

import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..environment import __version__, processor
from ..errors import GraphError, as_graph_errors
from ..graph.activation_memory import sample_bytes
from ..graph.half import HALF, LARGEST, MAGNITUDE, rounded, too_large
from ..graph.onnx_flat import FlatGraph
from ..graph.onnx_layout import keep_blocks
from ..graph.onnx_nest import flat_model, nest
from ..graph.onnx_padding import keep_zero_padding
from ..graph.precision import converted
from ..graph.quantize import Batch
from ..policy.values import Policy
from .engine import FORMAT, METADATA_KEY, Engine
from .loading import Runtime, load
from .model_file import save_model
from .stored_samples import Samples
from .tolerance import differences
from .verification import check

LOW_AGREEMENT = 0.95  # of int8 or half with float; the zoo's networks reach 0.98


def assemble(
    flat: FlatGraph,
    policy: Policy | None,
    *,
    thresholds: str = "default",
    outputs: Sequence[str] = (),
    notes: Mapping[str, Any] | None = None,
) -> ir.Model:
    """Build the model of a flat graph, with the metadata that an engine reads.

    Args:
        flat: the graph; it must hold scores if there is a policy.
        policy: score and thresholds; None for a flat model.
        thresholds: ``"default"`` or ``"input"``, as for `export`.
        outputs: for a flat model, the outputs of the flat graph to keep, an exit's output first; by default the
            outputs of all exits. The ``label`` is taken from the first of the given names, or from the last exit.
        notes: labels, preprocessing and promise, as for `export`.
    """
    with as_graph_errors():
        if policy is None:
            kept = list(outputs) or flat.names()
            model = flat_model(flat, kept, kept[0] if outputs else kept[-1])
        else:
            model = nest(flat, policy, thresholds=thresholds)
        keep_blocks(model)
        keep_zero_padding(model)
    model.metadata_props[METADATA_KEY] = json.dumps(about(flat, policy, thresholds, notes))
    return model


def about(
    flat: FlatGraph, policy: Policy | None, thresholds: str, notes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the metadata that an engine reads; the arguments are those of `assemble`."""
    shape = flat.value("output_1").shape
    assert shape is not None
    known = {
        "format": FORMAT,
        "version": __version__,
        "policy": None if policy is None else policy.to_json(),
        "inputs": [value.name for value in flat.model.graph.inputs],
        "exits": flat.num_exits,
        "thresholds": thresholds,
        "batch": "dynamic" if flat.dynamic else 1,
        "sample_bytes": sample_bytes(flat),
        "output_shape": [d if isinstance(d, int) else 0 for d in list(shape)[1:]],
        "labels": [],
        "preprocessing": None,
        "promise": None,
    }
    if flat.lengths:
        known["lengths"] = [asdict(length) for length in flat.lengths]
    if policy is not None and thresholds == "input" and flat.dynamic:
        known["per_sample"] = True
    return {**known, **(notes or {})}


def check_answers(
    path: Path, expected: Samples, source: str, *, runtime: Runtime = "onnxruntime", strict: bool = True
) -> None:
    """Raise `GraphError` if a file's outputs differ from the expected ones at any exit, per sample or in a batch."""
    if problems := check(load(path, threads=1, runtime=runtime), expected, strict=strict).problems:
        why = "does its forward depend on values, on random numbers, or on other samples of the batch?"
        if source != "the network":  # the forward agreed with the graph before the conversion
            why = f"{runtime} computes it wrongly on this machine ({processor()}): export it in float32"
        raise GraphError(f"the exported graph differs from {source}: {problems[0]}; {why}")


def in_precision(
    flat: FlatGraph, batches: Sequence[Batch], precision: str, expected: Samples
) -> tuple[FlatGraph, Samples, dict[str, Any]]:
    """Return the converted graph, the outputs of its exits for the samples, and its agreement with the float graph.

    The float graph is first compared with the network. Float operations that differ in the last bit may round a value
    to the neighboring int8 step, so the exported file may differ from this graph by the mean difference between int8
    and float. A wrong row or a missing node makes a far larger difference. A half graph is computed in float32, with
    every half value rounded to the nearest number of the type. In bf16, this changes a value by up to 2^-8 of it. On a
    processor with instructions for bf16, OpenVINO drops the bits that do not fit for some values, which changes them
    by up to 2^-7, always toward 0, so that the errors of the layers add up. The report and the allowed differences are
    therefore those of the graph that drops them for all values, the coarsest. fp16 is always rounded to the nearest.

    Raises:
        GraphError: the network cannot be converted, or one of its values for the samples is too large for fp16.
    """
    low = converted(flat, precision, batches)
    computed = rounded(low, precision) if precision in HALF else low
    names = flat.names() + (flat.names("score") if expected.scores else [])
    sizes = [str(v.name) for v in computed.model.graph.outputs if str(v.name).startswith(MAGNITUDE)]
    with tempfile.TemporaryDirectory() as folder, as_graph_errors():
        path = Path(folder) / "flat.onnx"
        save_model(assemble(flat, None), path)
        check_answers(path, expected, "the network")
        save_model(assemble(flat, None, outputs=names), path)
        exact = load(path)
        if sizes:
            save_model(assemble(computed, None, outputs=[*names, *sizes]), path)
            _check_sizes(load(path), batches, sizes, precision)
        save_model(assemble(computed, None, outputs=names), path)
        coarse = load(path)
        if precision == "bf16":
            save_model(assemble(rounded(low, precision, toward_zero=True), None, outputs=names), path)
        report, slack = _disagreement(exact, load(path), batches)
        rows = [coarse.outputs(*(i[s : s + 1] for i in expected.inputs))[1:] for s in range(len(expected))]
    outputs = [np.concatenate(exit) for exit in zip(*rows, strict=True)]
    exits = flat.num_exits
    if precision not in HALF:
        del report["largest_difference"]
    return low, Samples(expected.inputs, tuple(outputs[:exits]), tuple(outputs[exits:]), *slack), report


def _check_sizes(engine: Engine, batches: Sequence[Batch], names: Sequence[str], precision: str) -> None:
    """Raise `GraphError` for the first value that is too large for the type."""
    most = np.max([engine.outputs(*batch)[-len(names) :] for batch in batches], axis=0)
    for name, size in zip(names, most, strict=True):
        if size > LARGEST[precision]:
            raise GraphError(too_large(f"the value {name.removeprefix(MAGNITUDE)!r}", float(size), precision))


def _disagreement(
    exact: Engine, rounded: Engine, batches: Sequence[Batch]
) -> tuple[dict[str, Any], tuple[NDArray[Any], tuple[float, ...]]]:
    """Return the report for the metadata, and mean differences: of outputs per exit and column, of scores per exit.

    Agreement is the share of equal labels, or for one output per sample (regression), the share of the float outputs'
    variance that int8 explains (R^2).
    """
    exits, samples = exact.num_exits, sum(len(batch[0]) for batch in batches)
    same, error, first, second, scores, largest = np.zeros((6, exits))
    columns = np.zeros((exits, exact.metadata["output_shape"][0]))
    for batch in batches:
        answers = [engine.outputs(*batch)[1:] for engine in (exact, rounded)]
        a, b = (np.stack(answer[:exits]).astype(np.float64) for answer in answers)
        apart = differences(a, b)
        sums = [(same, a.argmax(axis=2) == b.argmax(axis=2)), (error, apart**2), (first, a), (second, a**2)]
        if len(answers[0]) > exits:
            sums.append((scores, differences(*(np.stack(answer[exits:]) for answer in answers))))
        for total, value in sums:
            total += len(batch[0]) / samples * value.reshape(exits, -1).mean(axis=1)
        largest = np.maximum(largest, apart.reshape(exits, -1).max(axis=1))
        columns += len(batch[0]) / samples * np.moveaxis(apart, 2, 1).reshape(*columns.shape, -1).mean(axis=2)
    several = exact.metadata["output_shape"][0] > 1
    agreement = same if several else 1 - error / np.maximum(second - first**2, np.finfo(np.float32).tiny)
    report = {"samples": samples, "agreement": agreement.tolist(), "mean_difference": columns.mean(axis=1).tolist()}
    report["largest_difference"] = largest.tolist()
    return report, (columns, tuple(scores.tolist()))


def warn_of_low_agreement(precision: str, agreement: Sequence[float]) -> None:
    """Warn if the converted network agrees with float at some exit in less than `LOW_AGREEMENT` of the samples."""
    worst = int(np.argmin(agreement))
    if agreement[worst] < LOW_AGREEMENT:
        remedy = "give more calibration samples, like the inputs in use, or export in float32"
        if precision == "int8-full-range":
            remedy = "on a processor without VNNI, 16-bit sums saturate: use precision='int8'"
        warnings.warn(
            f"the {precision} network agrees with the float network in only {agreement[worst]:.1%} of the calibration "
            f"samples at exit {worst + 1} on this machine ({processor()}); {remedy}",
            stacklevel=3,
        )
