"""bf16 files on processors that compute in bf16, and on those that do not."""

import importlib
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest

from branchynet import export, load, verify
from branchynet.deploy.stored_samples import read_samples
from branchynet.deploy.verification import check
from branchynet.errors import GraphError
from branchynet.graph.half import in_half, rounded
from helpers.verified_files import TWO, changed, images, initializers, network

assembly = importlib.import_module("branchynet.deploy.assembly")
AVX2 = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}  # without instructions for bf16
EXPORT = """
import sys
from branchynet import export
from helpers.verified_files import TWO, images, network
export(network(), sys.argv[1], policy=TWO, example=images(), precision="bf16")
"""
VERIFY = "import sys; from branchynet import verify; sys.exit(not verify(sys.argv[1], runtime='openvino').passed)"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    pytest.importorskip("openvino")
    path = tmp_path_factory.mktemp("bf16") / "m.onnx"
    return export(network(), path, policy=TWO, example=images(), precision="bf16")


def run(code, path):
    folders = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code, str(path)], env={**AVX2, "PYTHONPATH": folders}, check=True)


def test_a_file_of_one_processor_is_right_on_the_other(file, tmp_path):
    run(VERIFY, file)
    run(EXPORT, tmp_path / "avx2.onnx")
    found = verify(tmp_path / "avx2.onnx", runtime="openvino")
    assert found.passed, found


@pytest.mark.parametrize("toward_zero", [False, True])
def test_both_ways_of_rounding_are_right(file, tmp_path, toward_zero):
    """The graphs that round in float32 give the same outputs on every processor."""
    exporting = importlib.import_module(export.__module__)
    score = importlib.import_module("branchynet.policy.scores").resolve(TWO.score)
    flat = in_half(exporting.flatten(network(), images(), score=score), "bf16")
    model = assembly.assemble(rounded(flat, "bf16", toward_zero=toward_zero), TWO)
    importlib.import_module("branchynet.deploy.model_file").save_model(model, tmp_path / "m.onnx")
    engine = load(tmp_path / "m.onnx", threads=1)
    assert check(engine, read_samples(file)).passed


@pytest.mark.parametrize("name", ["backbone.fc.weight", "branches.0.1.weight", "backbone.b.0.weight"])
@pytest.mark.parametrize("factor", [0.8, -1.0])
def test_a_wrong_bf16_graph_is_refused(file, tmp_path, name, factor):
    def scale(model):
        for tensor in initializers(model, name, onnx.TensorProto.BFLOAT16):
            bits = np.frombuffer(tensor.raw_data, np.uint16).astype(np.uint32) << 16  # older onnx reads no bf16
            scaled = (bits.view(np.float32) * np.float32(factor)).view(np.uint32) >> 16
            tensor.raw_data = scaled.astype(np.uint16).tobytes()

    found = verify(changed(file, tmp_path, scale), runtime="openvino")
    assert not found.passed and "outputs differ by" in str(found)


def test_export_refuses_a_wrong_bf16_graph_without_blame_of_the_forward(tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    exporting = importlib.import_module(export.__module__)

    def other(flat, policy, **options):
        for value in flat.model.graph.initializers.values():
            array = value.const_value.numpy()
            if value.name.endswith("fc.bias"):
                value.const_value = exporting.ir.tensor(array + 1, name=value.name)
        return assembly.assemble(flat, policy, **options)

    monkeypatch.setattr(exporting, "assemble", other)
    with pytest.raises(GraphError, match=r"differs from its flat bf16 graph.*openvino computes it wrongly") as caught:
        export(network(), tmp_path / "m.onnx", policy=TWO, example=images(), precision="bf16")
    assert "forward" not in str(caught.value) and not list(tmp_path.iterdir())
