"""AlexNet, ResNet and their branches compared with section 2 of the paper's description, computed by hand."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import nn

from branchynet import Policy, export, load
from branchynet.errors import InputError
from branchynet.graph.macs import exit_macs
from branchynet.graph.onnx_flat import flatten
from branchynet.nn.network import BranchyNet
from branchynet.zoo import alexnet, b_alexnet, b_resnet, resnet
from branchynet.zoo.alexnet import AlexNet
from branchynet.zoo.layers import LocalResponseNorm, Normalize
from helpers.loop import every_exit, figure_2, safe_thresholds

published_resnet = functools.partial(b_resnet, branches="published")
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SIZES = (20, 32, 56, 110)


def images(rows, seed=0):
    return torch.rand(rows, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def shapes_of(net):
    return [tuple(p.shape) for p in net.parameters()]


@functools.cache
def macs(make, *args):
    return exit_macs(flatten(make(*args), images(2)))


def pool(x):
    return F.max_pool2d(x, 3, 2, ceil_mode=True)


def norm(x):
    """ReLU, pooling and Chainer's LRN in the published order; PyTorch divides alpha by the window."""
    return F.local_response_norm(pool(F.relu(x)), 3, alpha=3 * 5e-5, beta=0.75, k=2.0)


def normalized(x):
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


ALEXNET = [
    *[(32, 3, 5, 5), (32,), (64, 32, 5, 5), (64,), (96, 64, 3, 3), (96,), (96, 96, 3, 3), (96,), (64, 96, 3, 3), (64,)],
    *[(256, 1024), (256,), (128, 256), (128,), (10, 128), (10,)],
]
# The first and second branch of each source, by the convolution that they follow.
PLACES = {"text": (1, 2), "figure": (1, 3), "code": (2, 3)}
FED = {1: (32, 8 * 8), 2: (64, 4 * 4), 3: (96, 2 * 2)}  # channels, positions before the linear layer


def branch_shapes(places):
    shapes = []
    for convolutions, place in zip((2, 1), places, strict=True):
        channels, positions = FED[place]
        shapes += [(32, channels, 3, 3), (32,)]
        shapes += [(32, 32, 3, 3), (32,)] * (convolutions - 1)
        shapes += [(10, 32 * positions), (10,)]
    return shapes


def published_trunk(x, w):
    """The raw outputs of the first three convolutions, and the logits; `w` in the order of the layers."""
    first = F.conv2d(normalized(x), w[0], w[1], padding=2)
    second = F.conv2d(norm(first), w[2], w[3], padding=2)
    third = F.conv2d(norm(second), w[4], w[5], padding=1)
    x = F.relu(F.conv2d(F.relu(third), w[6], w[7], padding=1))
    x = pool(F.relu(F.conv2d(x, w[8], w[9], padding=1))).flatten(1)
    x = F.relu(F.linear(F.relu(F.linear(x, w[10], w[11])), w[12], w[13]))
    return {1: first, 2: second, 3: third}, F.linear(x, w[14], w[15])


def published_branch(raw, w, convolutions):
    """The released code's branch: ReLU, pooling, LRN, then `convolutions`, pooling and a linear layer."""
    x = norm(raw)
    for n in range(convolutions):
        x = F.relu(F.conv2d(x, w[2 * n], w[2 * n + 1], padding=1))
    return F.linear(pool(x).flatten(1), w[2 * convolutions], w[2 * convolutions + 1])


def test_alexnet_is_the_published_network():
    net, x = alexnet().eval(), images(3)
    assert shapes_of(net) == ALEXNET
    torch.testing.assert_close(net(x), published_trunk(x, list(net.parameters()))[1])


@pytest.mark.parametrize("branches", PLACES)
def test_b_alexnet_is_the_published_network(branches):
    net, x, places = b_alexnet(branches=branches).eval(), images(3), PLACES[branches]
    assert isinstance(net, BranchyNet) and net.num_exits == 3
    assert shapes_of(net) == ALEXNET + branch_shapes(places)
    w = list(net.parameters())
    raw, last = published_trunk(x, w)
    first = published_branch(raw[places[0]], w[16:22], 2)
    second = published_branch(raw[places[1]], w[22:], 1)
    torch.testing.assert_close(net(x), (first, second, last))


def test_pooling_rounds_up_at_every_layer():
    shapes = []
    net = alexnet()
    for module in net.modules():
        if isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(lambda m, args, y: shapes.append((args[0].shape[-1], y.shape[-1])))
    net(images(1))
    assert shapes == [(32, 16), (16, 8), (8, 4)]


def test_narrower_alexnets():
    net = AlexNet(7, channels=(4, 5, 6, 7, 8), hidden=(9, 10))
    assert net(images(2)).shape == (2, 7)
    assert [s[0] for s in shapes_of(net)[::2]] == [4, 5, 6, 7, 8, 9, 10, 7]


CONV = {
    1: 32 * 32 * 32 * 3 * 25,
    2: 16 * 16 * 64 * 32 * 25,
    3: 8 * 8 * 96 * 64 * 9,
    4: 8 * 8 * 96 * 96 * 9,
    5: 8 * 8 * 64 * 96 * 9,
}
LINEAR = 1024 * 256 + 256 * 128 + 128 * 10
WINDOW = {1: 16 * 16 * 32 * 32, 2: 8 * 8 * 64 * 64}  # the two LRN of the trunk, whose sums are 1x1 convolutions


def test_multiply_accumulates_of_alexnet_are_those_of_the_paper():
    trunk, branch = macs(functools.partial(b_alexnet, branches="text"))
    assert trunk == (CONV[1] + WINDOW[1], CONV[2] + WINDOW[2], CONV[3] + CONV[4] + CONV[5] + LINEAR)
    first, second = 2 * 16 * 16 * 32 * 32 * 9 + 8 * 8 * 32 * 10, 8 * 8 * 32 * 64 * 9 + 4 * 4 * 32 * 10
    assert branch == (first, second, 0)
    assert round((sum(trunk) - sum(WINDOW.values())) / 1e6) == 28
    assert 5 < (trunk[0] + branch[0]) / 1e6 < 7.5


@pytest.mark.parametrize("n", SIZES)
def test_resnet_has_n_layers_and_the_published_shapes(n):
    net, shapes = resnet(n), []
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    for name in ("stem", "stage1", "stage2", "stage3"):
        net.get_submodule(name).register_forward_hook(lambda m, args, y: shapes.append(tuple(y.shape[1:])))
    assert net(images(2)).shape == (2, 10)
    assert len(convolutions) + 1 == n
    assert shapes == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert all(m.kernel_size == (3, 3) and m.bias is None for m in convolutions), "shortcuts have no parameters"


def test_a_shortcut_takes_every_second_position_and_adds_empty_channels():
    block, x = resnet(20).stage2[0].eval(), torch.rand(2, 16, 6, 6)
    nn.init.zeros_(block.bn2.weight)
    y = block(x)
    torch.testing.assert_close(y[:, :16], x[:, :, ::2, ::2])
    assert y.shape == (2, 32, 3, 3) and not y[:, 16:].any()


@pytest.mark.heavy
def test_multiply_accumulates_of_resnet_110_are_those_of_the_paper():
    trunk, branch = macs(published_resnet, 110)
    stem, stage = 32 * 32 * 16 * 3 * 9, 36 * 32 * 32 * 16 * 16 * 9
    later = stage - 32 * 32 * 16 * 16 * 9 // 2  # the first convolution of a stage has half the channels to read
    assert trunk == (stem, stage, 2 * later + 64 * 10)
    normalization = 2 * (37 * 16 * 32**2 + 36 * 32 * 16**2 + 36 * 64 * 8**2)  # counted in the published 255 M
    assert round((sum(trunk) + normalization) / 1e6) == 255
    window = 32 * 32 * 64 * 64
    published = 32 * 32 * (64 * 16 * 25 + 32 * 64 * 9 + 32 * 32 * 9) + 32 * 32 * 32 * 10
    assert branch == (published + window, 2 * 32 * 32 * 16 * 16 * 9 + 16 * 32 * 32 * 10, 0)
    assert round(published / 1e6) == 55


def test_b_resnet_has_the_published_branches():
    net, x = published_resnet(20).eval(), images(2)
    assert net.taps == ("stem", "stage1") and net.num_exits == 3
    w = list(net.branches[0].parameters())
    y = F.relu(F.conv2d(net.backbone.stem(net.backbone.normalize(x)), w[0], w[1], padding=2))
    y = F.local_response_norm(y, 3, alpha=3 * 5e-5, beta=0.75, k=2.0)
    y = F.relu(F.conv2d(F.relu(F.conv2d(y, w[2], w[3], padding=1)), w[4], w[5], padding=1))
    first, second, last = net(x)
    torch.testing.assert_close(first, F.linear(y.flatten(1), w[6], w[7]))
    assert second.shape == (2, 10)
    torch.testing.assert_close(last, net.backbone(x))


def test_pixels_are_normalized_inside():
    x = images(4)
    torch.testing.assert_close(Normalize()(x), normalized(x))


@pytest.mark.parametrize(("channels", "size"), [(1, 3), (2, 3), (32, 3), (64, 3), (7, 5), (3, 9), (8, 1)])
def test_local_response_norm_equals_torchs(channels, size):
    ours = LocalResponseNorm(channels, size, alpha=0.3)  # large, so that the sum matters
    theirs = nn.LocalResponseNorm(size, alpha=size * 0.3, beta=0.75, k=2.0)
    x = torch.randn(3, channels, 5, 4, generator=torch.Generator().manual_seed(channels))
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(size))
    results = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        (y * weight).sum().backward()
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-6)


def test_constants_are_not_in_the_state_dict():
    kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    for net in (b_alexnet(), b_alexnet(branches="text"), published_resnet(20)):
        assert all(name.rpartition(".")[2] in kinds for name in net.state_dict())


@pytest.mark.parametrize("branches", PLACES)
def test_the_exported_file_agrees_with_the_loop(branches, tmp_path):
    torch.manual_seed(1)
    net, x = b_alexnet(branches=branches), images(24)
    outputs = every_exit(net, (x,))
    thresholds = safe_thresholds(outputs, (0.4, 0.5), gap=1e-6)
    export(net, tmp_path / "model.onnx", policy=Policy(thresholds=thresholds), example=x)
    answer = load(tmp_path / "model.onnx", threads=1)(x.numpy())
    expected = [figure_2(sample, thresholds) for sample in outputs]
    assert answer.exit.tolist() == [n for n, _ in expected]
    assert set(answer.exit.tolist()) == {1, 2, 3}
    np.testing.assert_allclose(answer.output, np.stack([z for _, z in expected]), atol=1e-4)


@pytest.mark.parametrize("n", [0, 2, 18, 21, 111])
@pytest.mark.parametrize("make", [resnet, b_resnet, published_resnet])
def test_other_depths_are_refused(make, n):
    with pytest.raises(InputError, match=rf"n={n} is not 6m \+ 2.*use \d+ or \d+"):
        make(n)


def test_unknown_branches_are_refused():
    with pytest.raises(InputError, match=r"branches='texts'.*did you mean 'text'"):
        b_alexnet(branches="texts")


@pytest.mark.parametrize("target", ["latency", "batch"])
@pytest.mark.parametrize(
    ("make", "plain", "exits"),
    [(b_alexnet, alexnet, 3), (functools.partial(b_resnet, 110), functools.partial(resnet, 110), 4)],
)
def test_designed_exits_share_the_trunk(make, plain, exits, target):
    torch.manual_seed(0)
    net, x = make(target=target).eval(), images(3)
    assert net.num_exits == exits and net.backbone.state_dict().keys() == plain().state_dict().keys()
    assert [o.shape for o in net(x)] == [(3, 10)] * exits
    torch.testing.assert_close(net(x)[-1], net.backbone(x))
    with pytest.raises(InputError, match=r"target='speed' is none of latency, batch"):
        make(target="speed")


def test_exits_are_designed_for_resnet_110_only():
    with pytest.raises(InputError, match=r"n=20, only for 110.*branches='published'"):
        b_resnet(20)
    with pytest.raises(InputError, match=r"branches='publish'.*did you mean 'published'"):
        b_resnet(110, branches="publish")


@pytest.fixture(scope="module")
def crops():
    """Pieces of two photographs at three scales."""
    pieces = []
    for photograph in load_sample_images().images:
        image = torch.tensor(photograph).permute(2, 0, 1).float() / 255
        for scale in (1, 2, 4):
            windows = F.avg_pool2d(image, scale).unfold(1, 32, 24).unfold(2, 32, 24)
            found = windows.permute(1, 2, 0, 3, 4).reshape(-1, 3, 32, 32)
            pieces.append(found[:: max(1, len(found) // 60)])
    return torch.cat(pieces)


@pytest.mark.parametrize(
    "make",
    [
        b_alexnet,
        functools.partial(b_alexnet, target="batch"),
        functools.partial(b_alexnet, branches="text"),
        functools.partial(b_resnet, 110),
        functools.partial(b_resnet, 110, target="batch"),
        functools.partial(b_resnet, 110, branches="published"),
    ],
)
def test_exits_with_shipped_weights_agree(make, crops):
    """The photographs differ from the training images; exits with weights of another network would not agree."""
    with torch.no_grad():
        *early, last = (output.argmax(dim=1) for output in make(pretrained=True).eval()(crops))
    for labels in early:
        often, often_last = (torch.bincount(found, minlength=10) / len(crops) for found in (labels, last))
        assert (labels == last).float().mean() > often @ often_last + 0.15


def test_other_windows_are_refused():
    with pytest.raises(InputError, match=r"size=4 has no middle channel.*odd"):
        LocalResponseNorm(8, size=4)


@pytest.mark.parametrize(
    "make", [alexnet, b_alexnet, functools.partial(resnet, 20), functools.partial(published_resnet, 20)]
)
def test_other_numbers_of_classes(make):
    outputs = make(num_classes=7)(images(2))
    assert {o.shape for o in (outputs if isinstance(outputs, tuple) else (outputs,))} == {(2, 7)}
    with pytest.raises(InputError, match=r"10 classes, not 7.*pretrained=False"):
        make(num_classes=7, pretrained=True)


def test_weights_that_do_not_ship_are_named():
    with pytest.raises(InputError, match=r"no weights 'resnet44-cifar10' ship.*'lenet-mnist'.*pretrained=False"):
        resnet(44, pretrained=True)
