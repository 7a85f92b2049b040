"""Every operator computes what ONNX Runtime computes, on random values."""

import numpy as np
import pytest
import torch

from branchynet import from_onnx
from branchynet.onnx_import.operators import OPERATORS
from helpers.onnx_nodes import node_file, runtime_answers, values
from helpers.operator_cases import CASES

IN_GRAPHS = {"ConstantOfShape", "NonZero", "Range", "Scatter", "Upsample"}  # test_graphs.py
# float32: both sides round each of some hundred sums, in another order.
RTOL, ATOL = 1e-4, 1e-5


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_node_equals_onnx_runtime(case, tmp_path):
    path, given = node_file(case, tmp_path / "node.onnx"), values(case)
    expected = runtime_answers(path, given)
    net = from_onnx(path, outputs=[f"y{n}" for n in range(case.outputs)]).eval()
    with torch.no_grad():
        found = net(**{name: torch.from_numpy(value) for name, value in given.items()})
    found = list(found.values()) if isinstance(found, dict) else [found]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.numpy().dtype == theirs.dtype and tuple(ours.shape) == theirs.shape
        np.testing.assert_allclose(ours.numpy(), theirs, RTOL, ATOL)


def test_every_operator_has_a_case():
    assert {case.operator for case in CASES} == OPERATORS.keys() - IN_GRAPHS
