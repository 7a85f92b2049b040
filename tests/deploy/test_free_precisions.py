"""Free lengths go with every precision, layout and runtime: an exit answers as PyTorch does, within the precision."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from branchynet import BranchyNet, Policy, export, load

# Of the largest output: rounding of about 2^-7, 2^-11 and 2^-8 of the largest value per layer. The mean over the
# length makes outputs several times smaller than the values before it. A wrong row or length differs by about 1.
ALLOWED = {"int8": 0.3, "fp16": 0.005, "bf16": 0.05}


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


@pytest.mark.parametrize("layout", ["nested", "stages"])
@pytest.mark.parametrize("precision", ALLOWED)
def test_converted_files_take_other_lengths(tmp_path, precision, layout):
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), Mean(), nn.Linear(8, 3))
    net = BranchyNet(trunk, {"1": nn.Sequential(Mean(), nn.Linear(8, 3))}).eval()
    x, other = torch.randn(40, 9, 4), torch.randn(7, 5, 4)
    path = export(
        net, tmp_path / "net", policy=Policy(thresholds=(1.0,)), example=x, free={"input": {1: "n"}}, layout=layout,
        precision=precision, calibration=[x],
    )  # fmt: skip
    with torch.no_grad():
        expected = [output.numpy() for output in net(other)]
    for runtime in ("openvino",) if precision == "bf16" else ("onnxruntime", "openvino"):
        engine = load(path, threads=1, runtime=runtime)
        for exit, threshold in ((1, math.inf), (2, None)):
            answer = engine(other, thresholds=[threshold])
            assert set(answer.exit) == {exit}
            want = expected[exit - 1]
            np.testing.assert_allclose(answer.output, want, atol=ALLOWED[precision] * np.abs(want).max(), rtol=0)
