"""Networks with several exits of their own."""

import numpy as np
import pytest
import torch
from torch import nn

from branchynet import BranchyNet, Policy, attach, export, fit, load, measure, record
from branchynet.deploy.torch_engine import TorchEngine
from branchynet.errors import GraphError, InputError
from branchynet.nn.network import count_exits
from helpers.loop import agree_in_batches, every_exit, safe_thresholds

CLASSES = 4


class Several(nn.Module):
    def __init__(self, as_list=False, classes=(CLASSES,) * 3):
        super().__init__()
        self.as_list = as_list
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(6, c) for c in classes)

    def forward(self, x):
        outputs = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            x = torch.tanh(layer(x))
            outputs.append(head(x))
        return outputs if self.as_list else tuple(outputs)


@pytest.mark.parametrize("as_list", [False, True])
def test_a_network_with_exits_of_its_own_is_taken_as_it_is(as_list, tmp_path):
    torch.manual_seed(0)
    net, x = Several(as_list), torch.randn(40, 6)
    assert count_exits(net, x) == 3
    batches = [(x, torch.randint(CLASSES, (40,)))]
    fit(net, batches, epochs=1, progress=False)
    made = record(net, batches, progress=False)
    assert made.num_exits == 3
    assert measure(net, x, seconds=0.01).num_exits == 3
    for head in net.heads:
        nn.init.normal_(head.weight, std=3.0)
    outputs = every_exit(net, (x,))
    policy = Policy(thresholds=safe_thresholds(outputs, (0.3, 0.5)))
    path = export(net, tmp_path / "model.onnx", policy=policy, example=x)
    agree_in_batches(load(path, threads=1), net, (x,), policy.thresholds)
    agree_in_batches(TorchEngine(net, policy, x), net, (x,), policy.thresholds)
    flat = load(export(net, tmp_path / "flat.onnx", policy=None, example=x), threads=1)
    np.testing.assert_allclose(np.stack(flat.outputs(x.numpy())[1:], 1), outputs, atol=1e-4)
    with pytest.raises(InputError, match="1 thresholds; 3 exits need 2"):
        export(net, tmp_path / "model.onnx", policy=Policy(thresholds=(0.5,)), example=x)


@pytest.mark.filterwarnings("ignore:.*holds more than the answer")
def test_outputs_of_different_shapes_are_one_exit_and_the_rest():
    x = torch.randn(5, 6)
    assert count_exits(Several(classes=(4, 4, 3)), x) == 1
    net = attach(Several(classes=(4, 4, 3)), ["layers.0"], example=x)
    assert net.num_exits == 2 and net(x)[-1].shape == (5, 4)


def test_branches_on_a_network_with_exits_of_its_own_are_refused():
    x = torch.randn(5, 6)
    with pytest.raises(GraphError, match=r"3 tensors of one shape \(2, 4\), which are exits of its own.*output="):
        attach(Several(), ["layers.0"], example=x)
    net = attach(Several(), ["layers.0"], example=x, output=lambda outputs: outputs[-1])
    assert [o.shape for o in net(x)] == [(5, CLASSES)] * 2
    with pytest.raises(GraphError, match="the branch at '0' is 3 tensors"):
        BranchyNet(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), {"0": Several()})(x)
