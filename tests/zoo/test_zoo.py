"""The layers of the paper's networks compared with the description in section 2, computed by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from branchynet import record
from branchynet.data import load_data, loader
from branchynet.errors import InputError
from branchynet.graph.macs import exit_macs
from branchynet.nn.network import BranchyNet
from branchynet.zoo import NETWORKS, b_alexnet, b_lenet, b_resnet, lenet
from helpers.onnx_graphs import flat_lenet

CONV_1, CONV_2, CONV_3 = 30 * 30 * 5 * 25, 17 * 17 * 10 * 5 * 25, 11 * 11 * 20 * 10 * 25
LINEAR_1, LINEAR_2 = 720 * 84, 84 * 10
BRANCH = 15 * 15 * 10 * 5 * 9 + 640 * 10


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def shaped(net, tensors):
    """The parameters of `net`, in the shapes of `tensors`."""
    assert [tuple(p.shape) for p in net.parameters()] == tensors
    return list(net.parameters())


TRUNK = [(5, 1, 5, 5), (5,), (10, 5, 5, 5), (10,), (20, 10, 5, 5), (20,), (84, 720), (84,), (10, 84), (10,)]


def pool(x):
    return F.relu(F.max_pool2d(x, 2, 2, ceil_mode=True))


def published(x, w):
    """The raw output of the first convolution and the logits, by section 2; `w` is in the order of its layers."""
    first = F.conv2d(x, w[0], w[1], padding=3)
    x = pool(F.conv2d(pool(first), w[2], w[3], padding=3))
    x = pool(F.conv2d(x, w[4], w[5], padding=3)).flatten(1)
    return first, F.linear(F.linear(x, w[6], w[7]), w[8], w[9])  # no non-linearity between the two


def test_lenet_is_the_published_network():
    net, x = lenet(), torch.rand(3, 1, 28, 28)
    w = shaped(net, TRUNK)
    torch.testing.assert_close(net(x), published(x, w)[1])
    assert parameters(net) == 130 + 1260 + 5020 + 60564 + 850


def test_b_lenet_is_the_published_network():
    net, x = b_lenet(branches="published"), torch.rand(3, 1, 28, 28)
    w = shaped(net, [*TRUNK, (10, 5, 3, 3), (10,), (10, 640), (10,)])
    first, last = published(x, w)
    early = F.linear(pool(F.conv2d(pool(first), w[10], w[11], padding=1)).flatten(1), w[12], w[13])
    outputs = net(x)
    assert isinstance(net, BranchyNet) and net.taps == ("conv1",) and net.num_exits == 2
    torch.testing.assert_close(outputs, (early, last))


def test_pooling_rounds_up_at_every_layer():
    net = b_lenet(branches="published")
    shapes = []
    for module in net.modules():
        if isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(lambda m, args, y: shapes.append((args[0].shape[-1], y.shape[-1])))
    net(torch.rand(1, 1, 28, 28))
    assert sorted(shapes) == [(11, 6), (15, 8), (17, 9), (30, 15), (30, 15)]


def test_multiply_accumulates_are_those_of_the_paper():
    trunk, branch = exit_macs(flat_lenet()[1])
    assert trunk == (CONV_1, CONV_2 + CONV_3 + LINEAR_1 + LINEAR_2) and branch == (BRANCH, 0)
    assert round(sum(trunk) / 1e6, 2) == 1.14
    assert round((trunk[0] + branch[0]) / 1e6, 2) == 0.22


@pytest.mark.parametrize("target", ["latency", "batch"])
def test_designed_exits_share_the_trunk(target):
    torch.manual_seed(0)
    net, x = b_lenet(target=target), torch.rand(3, 1, 28, 28)
    assert net.taps[0] == "input" and net.num_exits >= 3
    assert [o.shape for o in net.eval()(x)] == [(3, 10)] * net.num_exits
    assert net.backbone.state_dict().keys() == lenet().state_dict().keys()
    torch.testing.assert_close(net(x)[-1], net.backbone(x))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("b_lenet", b_lenet),
        ("b_lenet-published", lambda: b_lenet(branches="published")),
        ("b_alexnet", b_alexnet),
        ("b_alexnet-published", lambda: b_alexnet(branches="text")),
        ("b_resnet110", lambda: b_resnet(110)),
        ("b_resnet20-published", lambda: b_resnet(20, branches="published")),
    ],
)
def test_a_name_on_the_command_line_is_the_same_network_as_in_python(name, make):
    one, other = NETWORKS[name](num_classes=10), make()
    assert one.taps == other.taps
    assert [(k, v.shape) for k, v in one.state_dict().items()] == [(k, v.shape) for k, v in other.state_dict().items()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"branches": "publishd"}, r"branches='publishd' is none of designed, published; did you mean 'published'"),
        ({"target": "lattency"}, r"target='lattency' is none of latency, batch; did you mean 'latency'"),
    ],
)
def test_other_branches_and_targets_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        b_lenet(**arguments)


@pytest.mark.parametrize(
    "arguments", [{}, {"target": "batch"}, {"branches": "published"}], ids=lambda a: "-".join(a.values()) or "default"
)
def test_shipped_weights_recognize_digits_of_another_data_set(arguments):
    found = record(b_lenet(pretrained=True, **arguments), loader(load_data("digits").test, 300), progress=False)
    assert (1 - found.losses.mean(axis=0) > 0.4).all()  # far above the 0.1 of other weights


@pytest.mark.parametrize("make", [lenet, b_lenet])
def test_other_numbers_of_classes(make):
    outputs = make(num_classes=7)(torch.rand(2, 1, 28, 28))
    assert {o.shape for o in (outputs if isinstance(outputs, tuple) else (outputs,))} == {(2, 7)}
    with pytest.raises(InputError, match=r"10 classes, not 7.*pretrained=False"):
        make(num_classes=7, pretrained=True)
