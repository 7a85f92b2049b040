"""What other tools make of exported files: each changes files of B-LeNet, and ONNX Runtime runs the result."""

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

SAMPLES = 256
TOLERANCE = 1e-4  # of scores and outputs, relative to the largest of them: a tool may reorder sums
LAYOUTS = {"default": {}, "input": {"thresholds": "input"}, "stages": {"layout": "stages"}, "flat": {"policy": None}}


def _onnxslim(model, folder):
    import onnxslim

    return onnxslim.slim(model)


def _onnxsim(model, folder):
    import onnxsim

    return onnxsim.simplify(model)[0]


def _to_opset(opset):
    def convert(model, folder):
        from onnx import version_converter

        return version_converter.convert_version(model, opset)

    return convert


def _quantize_dynamic(model, folder):
    from onnxruntime.quantization import quantize_dynamic

    onnx.save(model, folder / "float.onnx")
    quantize_dynamic(folder / "float.onnx", folder / "dynamic.onnx")
    return onnx.load(folder / "dynamic.onnx")


def _to_float16(keep):
    def convert(model, folder):
        from onnxconverter_common import float16

        return float16.convert_float_to_float16(model, keep_io_types=keep)

    return convert


TOOLS = {  # by name: the package, the call, and whether it changes numbers on purpose
    "onnxslim": ("onnxslim", _onnxslim, False),
    "onnxsim": ("onnxsim", _onnxsim, False),
    "version converter, opset 20 to 21": ("onnx", _to_opset(21), False),
    "version converter, opset 20 to 17": ("onnx", _to_opset(17), False),
    "quantize_dynamic": ("onnxruntime", _quantize_dynamic, True),
    "float16": ("onnxconverter-common", _to_float16(False), True),
    "float16, keep_io_types=True": ("onnxconverter-common", _to_float16(True), True),
}


def version_of(tool):
    """Return the installed version of a tool; None if it is not installed."""
    try:
        return metadata.version(TOOLS[tool][0])
    except metadata.PackageNotFoundError:
        return None


def make(folder):
    """Export B-LeNet in every layout, with thresholds at which samples leave at every exit."""
    from branchynet import Policy, export, zoo
    from branchynet.data import load_data
    from helpers.loop import every_exit, safe_thresholds

    net, images = zoo.b_lenet(pretrained=True).eval(), load_data("digits").test.inputs()[:SAMPLES]
    thresholds = safe_thresholds(every_exit(net, (images,)), (0.3, 0.5, 0.5))
    for layout, options in LAYOUTS.items():
        path = folder / ("stages" if layout == "stages" else f"{layout}.onnx")
        export(net, path, **{"policy": Policy(thresholds=thresholds), "example": images, **options})
    np.save(folder / "images.npy", images.numpy())
    (folder / "thresholds.json").write_text(json.dumps(thresholds))


def outcome(folder, layout, tool):
    """Apply a tool to the file of a layout (for stages, to the first), and compare both files in ONNX Runtime.

    Returns:
        ``result`` is "same answers", "other numbers" (labels and exits are equal), "other answers", "the tool fails" or
        "does not load"; ``thresholds`` says whether a call of the result can give thresholds; the other entries are the
        shares of samples with another label and exit, and the largest difference of outputs.
    """
    source = folder / ("stages/stage_1.onnx" if layout == "stages" else f"{layout}.onnx")
    path = folder / "changed.onnx"
    try:
        onnx.save(TOOLS[tool][1](onnx.load(source), folder), path)
    except Exception as error:  # whatever the tool raises
        return {"result": "the tool fails", "error": type(error).__name__}
    try:
        answers, thresholds = _answers(folder, path)
    except Exception as error:  # ONNX Runtime's errors share no base class
        return {"result": "does not load", "error": type(error).__name__}
    wanted, _ = _answers(folder, source)
    moved = {name: float((answers[name] != wanted[name]).mean()) for name in ("label", "exit") if name in wanted}
    apart = {
        name: float(np.abs(answers[name].astype(np.float64) - values).max() / max(1.0, float(np.abs(values).max())))
        for name, values in wanted.items()
        if values.dtype == np.float32
    }
    kind = "same answers" if max(apart.values()) <= TOLERANCE else "other numbers"
    result = "other answers" if any(moved.values()) else kind
    return {"result": result, "thresholds": thresholds, "moved": moved, "difference": max(apart.values())}


def _answers(folder, path):
    """Return the outputs of a file by name, and whether its thresholds are inputs or constants ("" for none)."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    images, own = np.load(folder / "images.npy"), json.loads((folder / "thresholds.json").read_text())
    feeds = {}
    for value in session.get_inputs():
        given = np.array([own[int(value.name[-1]) - 1]]) if value.name.startswith("threshold_") else images
        feeds[value.name] = given.astype(np.float16 if value.type == "tensor(float16)" else np.float32)
    names = [output.name for output in session.get_outputs()]
    inputs = [i.name for i in (*session.get_inputs(), *session.get_overridable_initializers())]
    nested = "exit" in names
    thresholds = ("inputs" if any(i.startswith("threshold_") for i in inputs) else "constants") if nested else ""
    return dict(zip(names, session.run(None, feeds), strict=True)), thresholds


def outcomes(folder):
    """Return the outcome of every installed tool for every layout."""
    make(Path(folder))
    return {
        tool: {"version": version_of(tool), "layouts": {one: outcome(Path(folder), one, tool) for one in LAYOUTS}}
        for tool in TOOLS
        if version_of(tool) is not None
    }
