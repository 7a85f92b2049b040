"""Tolerances between engines: rounding passes and wrong values do not, next to any other values of an output."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from branchynet import BranchyNet, Policy, export, load, verify
from branchynet.deploy import checksum
from branchynet.deploy.tolerance import differences, tolerances
from branchynet.deploy.torch_engine import TorchEngine
from branchynet.errors import GraphError

MASKS = [-1e9, -1e8, -65504.0, float(torch.finfo(torch.float32).min), -float("inf")]

GONE = {
    "one class": np.arange(10) == 3,
    "most classes": np.arange(10) > 2,
    "here and there": np.random.default_rng(1).random((8, 10)) < 0.3,
}


def products(seed, rows, wide=64, classes=10, scale=1.0):
    """Outputs of a last layer, by float32 in order and by sums in another order; and by TF32's 10 bits."""
    rng = np.random.default_rng(seed)
    h, w = rng.standard_normal((rows, wide), np.float32) * scale, rng.standard_normal((classes, wide), np.float32)
    turned = rng.permutation(wide)
    coarse = [(a.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for a in (h, w)]
    return h @ w.T, h[:, turned] @ w[:, turned].T, coarse[0] @ coarse[1].T


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0, 1e6])
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("seed", range(20))
def test_rounding_is_allowed(seed, rows, scale):
    want, other, coarse = products(seed, rows, scale=scale)
    assert (differences(other, want) <= tolerances(want)).all()
    assert (differences(coarse, want) <= tolerances(want, 1e-2, coarse=True)).all()


# A mask of -65504 could be a logit of the same column, or, with coarse products, of the same row.
FAR = [(mask, m, coarse) for mask in MASKS if mask < -1e6 for m in GONE for coarse in (False, True)]
FAR += [(-65504.0, "one class", False), (-65504.0, "most classes", False)]


@pytest.mark.parametrize(("mask", "masked", "coarse"), FAR)
def test_masks_do_not_widen_other_tolerances(mask, masked, coarse):
    want = products(0, 8)[0]
    gone = GONE[masked] & np.ones((8, 10), bool)
    some = np.where(gone, np.float32(mask), want)
    plain = tolerances(want, coarse=coarse).max()
    assert (tolerances(some, coarse=coarse)[~gone] <= max(plain, 1e-3 * np.abs(want).max())).all()
    assert np.isfinite(tolerances(some)).all()


@pytest.mark.parametrize("scales", [(1e5, 1.0), (3e3, 1.0, 1e6), (640.0, 480.0, 640.0, 480.0, 1.0)])
def test_columns_of_another_scale_do_not_widen_the_tolerance_of_a_share(scales):
    rng = np.random.default_rng(0)
    want = (np.array(scales) * rng.uniform(0.2, 1, (8, len(scales)))).astype(np.float32)
    allowed = tolerances(want)
    share = scales.index(1.0)
    assert (allowed[:, share] <= 0.01).all()
    assert (allowed <= 1e-3 * np.maximum(np.abs(want).max(axis=0), 10)).all()


def test_maps_are_columns_by_class():
    want = np.random.default_rng(0).standard_normal((4, 3, 5, 6)).astype(np.float32) * np.array(
        [1.0, 10.0, 1e7], np.float32
    ).reshape(1, 3, 1, 1)
    allowed = tolerances(want)
    assert allowed.shape == want.shape and (allowed[:, :2] < 0.1).all() and allowed[:, 2].max() > 1e3


class Head(nn.Module):
    """Outputs as `finish(logits)` has them; `of_batch`: they depend on the other samples."""

    def __init__(self, finish, of_batch=False):
        super().__init__()
        self.finish, self.of_batch, self.a, self.h = finish, of_batch, nn.Linear(10, 10), nn.Linear(10, 6)

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.finish(5 * self.h(x - x.mean(0, keepdim=True) if self.of_batch else x))


def masked(value):
    return lambda z: z.masked_fill(torch.arange(6) == 5, value)


FINISHES = {
    "-1e9": masked(-1e9),
    "least float32": masked(float(torch.finfo(torch.float32).min)),
    "added": lambda z: z + torch.tensor([0, 0, 0, 0, -1e8, -1e8]),
    "price and shares": lambda z: torch.cat([3e5 + 1e5 * z[:, :1].tanh(), z[:, 1:].sigmoid()], dim=1),
}


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("kind", ["flat", "nested", "engine"])
def test_an_output_that_depends_on_the_batch_is_refused(finish, kind, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 10)
    for of_batch in (False, True):
        net = BranchyNet(Head(FINISHES[finish], of_batch), {"input": nn.Linear(10, 6)}).eval()
        policy = Policy(thresholds=(-1.0,))

        def make(net=net, policy=policy):
            if kind == "engine":
                return TorchEngine(net, policy, x)
            return export(net, tmp_path / "m.onnx", policy=policy if kind == "nested" else None, example=x)

        if of_batch:
            with pytest.raises(GraphError, match="other samples of the batch"):
                make()
        else:
            make()


@pytest.mark.parametrize("finish", FINISHES)
def test_swapped_classes_are_found(finish, tmp_path):
    torch.manual_seed(0)
    net = BranchyNet(Head(FINISHES[finish]), {"input": nn.Linear(10, 6)}).eval()
    path = export(net, tmp_path / "m.onnx", policy=Policy(thresholds=(1.0,)), example=torch.randn(8, 10))
    assert verify(path, threads=1).passed
    model, swapped = onnx.load(path), 0
    graphs = [model.graph]
    for graph in graphs:
        graphs += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
        for tensor in graph.initializer:
            if ".h." in tensor.name:
                array = numpy_helper.to_array(tensor)
                turned = np.take(array, [1, 2, 3, 0, 4, 5], axis=array.shape.index(6))
                tensor.CopyFrom(numpy_helper.from_array(turned, tensor.name))
                swapped += 1
    kept = [p for p in model.metadata_props if p.key != checksum.KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, tmp_path / "swapped.onnx")
    found = verify(tmp_path / "swapped.onnx", threads=1)
    assert swapped == 2 and not found.passed
    if "price" not in finish:
        assert "get another label, beyond a tie" in str(found)
    assert load(path, threads=1).float32
