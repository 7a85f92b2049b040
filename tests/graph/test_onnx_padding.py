"""Zero padding in front of a max pooling counts as zeros, in every version of the runtimes."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from branchynet import BranchyNet, Policy, export, load

BELOW_ZERO = nn.Threshold(10.0, -3.0)  # every value is -3, so that only padding can be the maximum


class Pooled(nn.Module):
    """Pool padded negative values twice: before the branch, and after it, where the file holds a nested graph."""

    def __init__(self, pad, pool, before=BELOW_ZERO):
        super().__init__()
        self.first = nn.Sequential(before, pad, pool)
        self.second = nn.Sequential(before, pad, pool)
        self.classify = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))

    def forward(self, x):
        return self.classify(self.second(self.first(x)))


def exported(backbone, example, path):
    torch.manual_seed(0)
    with torch.no_grad():
        backbone(example)
        net = BranchyNet(backbone, {"first": nn.Sequential(nn.Flatten(), nn.LazyLinear(3))})
        net(example)
    return net.eval(), export(net.eval(), path, policy=Policy(thresholds=(0.5,)), example=example)


def poolings(path):
    graph = onnx.load(path).graph
    found = []

    def walk(graph):
        for node in graph.node:
            if node.op_type == "MaxPool":
                found.append(node)
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    walk(attribute.g)

    walk(graph)
    return found


IMAGES = torch.randn(6, 2, 9, 9, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("pad", "pool", "inputs"),
    [
        (nn.ZeroPad2d(1), nn.MaxPool2d(2), IMAGES),
        (nn.ConstantPad2d((0, 1, 0, 1), 0.0), nn.MaxPool2d(3, 2), IMAGES),
        (nn.ConstantPad1d((2, 0), 0.0), nn.MaxPool1d(2), IMAGES[:, :, 0]),
        (nn.ZeroPad2d(2), nn.MaxPool2d(3, 2, padding=1), IMAGES),
    ],
    ids=["all sides", "one side", "signals", "padded twice"],
)
def test_zeros_are_the_maximum_of_negative_values(pad, pool, inputs, runtime, tmp_path):
    net, path = exported(Pooled(pad, pool), inputs, tmp_path / "net.onnx")
    with torch.no_grad():
        early, late = (output.numpy() for output in net(inputs))
    engine = load(path, threads=1, runtime=runtime)
    for thresholds, expected in (([np.inf], early), ([-1.0], late)):
        answer = engine(inputs, thresholds=thresholds)
        np.testing.assert_allclose(answer.output, expected, atol=1e-4)  # the order of a sum of at most 200 products
    assert [len(pool.output) for pool in poolings(path)] == [2, 2]  # no version of a runtime may fuse them


@pytest.mark.parametrize(
    "backbone",
    [
        Pooled(nn.ZeroPad2d(1), nn.MaxPool2d(2), nn.ReLU()),
        Pooled(nn.ReflectionPad2d(1), nn.MaxPool2d(2)),
        Pooled(nn.Identity(), nn.MaxPool2d(2, padding=1)),
    ],
    ids=["no value is negative", "no zeros", "padding of the pooling"],
)
def test_other_poolings_stay_as_they_are(backbone, tmp_path):
    _, path = exported(backbone, IMAGES, tmp_path / "net.onnx")
    assert [len(pool.output) for pool in poolings(path)] == [1, 1]
