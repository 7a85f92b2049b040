"""Random networks of several shapes, with branches, for the property tests."""

import random

import torch
from torch import nn

from branchynet.nn.attaching import attach
from branchynet.nn.branches import InputMLP, TokenLinear
from branchynet.nn.network import BranchyNet


class Residual(nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.short = nn.Identity() if stride == 1 and channels == out else nn.Conv2d(channels, out, 1, stride)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.short(x))


class Blocks(nn.Module):
    """A chain of blocks, then average pooling and a classifier."""

    def __init__(self, blocks, width, classes):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class Attention(nn.Module):
    """Self-attention with views that use the batch size, so that the graph computes shapes."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        b, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        a = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        return x + self.out((a @ v).transpose(1, 2).reshape(b, length, width))


class Tokens(nn.Module):
    """Attention blocks on embedded integer tokens, with a class token that is expanded to the batch."""

    def __init__(self, layers, width, classes):
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.layers = nn.ModuleList(Attention(width, 2) for _ in range(layers))
        self.fc = nn.Linear(width, classes)

    def forward(self, ids):
        x = torch.cat([self.cls.expand(ids.shape[0], -1, -1), self.embed(ids)], dim=1)
        for layer in self.layers:
            x = layer(x)
        return self.fc(x[:, 0])


class TwoInputs(nn.Module):
    """An image and a vector, joined half-way; the vector is read only after the first exit."""

    def __init__(self, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2)
        self.side = nn.Linear(5, 8)
        self.join = nn.Linear(16, 12)
        self.fc = nn.Linear(12, classes)

    def forward(self, image, vector):
        x = torch.relu(self.conv1(image))
        x = torch.relu(self.conv2(x)).amax((2, 3))
        x = torch.relu(self.join(torch.cat([x, self.side(vector)], dim=1)))
        return self.fc(x)


def chain(rng, classes):
    width, size = rng.choice([4, 7, 16]), rng.choice([9, 12])
    blocks = [
        nn.Sequential(
            nn.Conv2d(3 if i == 0 else width, width, 3, padding=1),
            rng.choice([nn.Identity, lambda: nn.BatchNorm2d(width)])(),
            nn.MaxPool2d(2, stride=1) if rng.random() < 0.5 else nn.Identity(),
            nn.ReLU(inplace=rng.random() < 0.5),
        )
        for i in range(4)
    ]
    taps = sorted(rng.sample(["input", "blocks.0", "blocks.1.0", "blocks.2", "blocks.3.2"], rng.choice([1, 2, 3])))
    example = (torch.rand(2, 3, size, size + 2),)
    return attach(Blocks(blocks, width, classes), taps, example=example), example


def residual(rng, classes):
    blocks = [Residual(3, 8, 1), Residual(8, 8, 1), Residual(8, 12, 2), Residual(12, 12, 1)]
    taps = rng.sample(["blocks.0", "blocks.0.bn1", "blocks.1.conv1", "blocks.2.conv2", "blocks.2"], 2)
    example = (torch.rand(2, 3, 10, 10),)
    return attach(Blocks(blocks, 12, classes), taps, example=example), example


def tokens(rng, classes):
    backbone = Tokens(4, 8, classes)
    taps = rng.sample(["layers.0", "layers.1", "layers.2"], 2)
    return attach(backbone, taps, example=torch.randint(50, (2, 7))), (torch.randint(50, (2, 7)),)


def two_inputs(rng, classes):
    example = (torch.rand(2, 2, 8, 8), torch.rand(2, 5))
    return attach(TwoInputs(classes), rng.choice([["conv1"], ["conv1", "join"]]), example=example), example


def tree(rng, classes):
    """A branch with a branch."""
    stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, classes))
    branch = BranchyNet(stem, {"0": InputMLP((6, 6, 6), classes)})
    blocks = [Residual(3, 3, 1), Residual(3, 6, 1), Residual(6, 6, 1)]
    extra = nn.Sequential(nn.Flatten(2), TokenLinear(64, classes))
    return BranchyNet(Blocks(blocks, 6, classes), {"blocks.0": branch, "blocks.1": extra}), (torch.rand(2, 3, 8, 8),)


FAMILIES = [chain, residual, tokens, two_inputs, tree]


def build(family, seed):
    """(net, example) with spread-out outputs, so that entropies differ from sample to sample."""
    torch.manual_seed(seed)
    net, example = family(random.Random(seed), classes=4)
    net.eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    spread_out(net, draw(example, 64, seed))
    return net, example


@torch.no_grad()
def spread_out(net, inputs):
    """Make every exit's outputs differ between the samples of `inputs`, a tuple or a dict."""
    outputs = net(**inputs) if isinstance(inputs, dict) else net(*inputs)
    for head, output in zip(heads(net), outputs, strict=True):
        spread_head(head, output)


@torch.no_grad()
def spread_head(head, output):
    """Scale and shift a last layer, whose `output` is given, so that outputs differ between samples."""
    gain = 1.5 / output.std(0).mean().clamp_min(1e-6)
    head.weight *= gain
    if head.bias is not None:
        mean = output.transpose(0, 1).flatten(1).mean(1)
        head.bias.copy_((head.bias - mean) * gain)


def heads(net):
    """The last linear or 1x1 layer of every exit, in the order of the exits."""
    for branch in net.branches:
        yield from heads(branch) if isinstance(branch, BranchyNet) else [last_linear(branch)]
    yield last_linear(net.output if isinstance(net.output, nn.Module) else net.backbone)


def last_linear(module):
    pointwise = (m for m in module.modules() if isinstance(m, nn.Linear) or getattr(m, "kernel_size", 0) == (1, 1))
    return list(pointwise)[-1]


def draw(example, samples, seed):
    """Random inputs like `example`, with `samples` rows."""
    generator = torch.Generator().manual_seed(seed + 1)
    return tuple(
        torch.randint(50, (samples, *t.shape[1:]), generator=generator)
        if t.dtype == torch.int64
        else torch.randn(samples, *t.shape[1:], generator=generator)
        for t in example
    )
