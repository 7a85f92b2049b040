"""AlexNet and B-AlexNet for 32 x 32 color images, with the layers of the paper and its released code.

Inputs are pixels in [0, 1], `(B, 3, 32, 32)` float32, which the networks normalize; outputs are logits `(B, 10)`.
"""

from torch import Tensor, nn

from ..nn.network import BranchyNet
from .designs import check_known, designed
from .layers import LocalResponseNorm, Normalize, initialize
from .weights import load_shipped


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, 2, ceil_mode=True)  # rounds up, as in Chainer


def _block(channels: int) -> nn.Sequential:
    # The paper has ReLU before max-pooling. They commute: this order trains faster, and `export` swaps them.
    return nn.Sequential(_pool(), nn.ReLU(), LocalResponseNorm(channels))


class AlexNet(nn.Module):
    """The paper's AlexNet: five convolutions and three linear layers; 28 M multiply-accumulates.

    Fewer `channels` of the convolutions and `hidden` widths of the linear layers give smaller plain networks.
    """

    def __init__(
        self,
        num_classes: int = 10,
        channels: tuple[int, int, int, int, int] = (32, 64, 96, 96, 64),
        hidden: tuple[int, int] = (256, 128),
    ) -> None:
        super().__init__()
        first, second, third, fourth, fifth = channels
        self.normalize = Normalize()
        self.conv1 = nn.Conv2d(3, first, 5, padding=2)
        self.block1 = _block(first)
        self.conv2 = nn.Conv2d(first, second, 5, padding=2)
        self.block2 = _block(second)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1)
        self.relu3 = nn.ReLU()
        self.conv4 = nn.Conv2d(third, fourth, 3, padding=1)
        self.relu4 = nn.ReLU()
        self.conv5 = nn.Conv2d(fourth, fifth, 3, padding=1)
        self.block5 = nn.Sequential(_pool(), nn.ReLU(), nn.Flatten())
        self.classifier = nn.Sequential(
            *(nn.Linear(16 * fifth, hidden[0]), nn.ReLU(), nn.Dropout(0.5)),
            *(nn.Linear(hidden[0], hidden[1]), nn.ReLU(), nn.Dropout(0.5)),
            nn.Linear(hidden[1], num_classes),
        )
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, num_classes)`."""
        x = self.block1(self.conv1(self.normalize(x)))
        x = self.block2(self.conv2(x))
        x = self.relu4(self.conv4(self.relu3(self.conv3(x))))
        return self.classifier(self.block5(self.conv5(x)))


def alexnet(num_classes: int = 10, *, pretrained: bool = False) -> AlexNet:
    """Return AlexNet, untrained or with the weights shipped for CIFAR-10.

    Raises:
        InputError: pretrained weights for a number of classes other than 10.
    """
    net = AlexNet(num_classes)
    return load_shipped(net, "alexnet-cifar10", num_classes) if pretrained else net


# The convolutions after which the paper's text, Figure 1 and code place the two branches.
_PLACES = {"text": (1, 2), "figure": (1, 3), "code": (2, 3)}
# Tap, channels and height after each convolution. Branch and trunk share ReLU, pooling and LRN; after the third
# convolution the trunk has only ReLU, so the branch holds the other two.
_TAPS = {1: ("block1", 32, 16), 2: ("block2", 64, 8), 3: ("relu3", 96, 8)}

# Exits designed by `advise`, by target; see benchmarks/experiments/design.py.
_DESIGNS = {
    "latency": {"block1": "conv-64-64-128", "conv4": "hidden-64"},
    "batch": {"input": "conv-32-64", "block1": "conv-64-64-128"},
}


def b_alexnet(
    num_classes: int = 10, *, branches: str = "designed", target: str = "latency", pretrained: bool = False
) -> BranchyNet:
    """Return B-AlexNet: AlexNet with two early exits, designed by `advise` or from the paper; 3 exits in all.

    The paper's branches have two and one convolutions. The released code taps the output of the convolutions and
    repeats ReLU, pooling and LRN in the branch. Here the branch shares those of the trunk, which is the same function.

    Args:
        num_classes: number of classes.
        branches: ``"designed"``; or the places of the paper's branches, on which its sources disagree: ``"text"`` after
            convolutions 1 and 2, ``"figure"`` (Figure 1) after 1 and 3, ``"code"`` after 2 and 3.
        target: ``"latency"`` for the design for batches of 1, or ``"batch"`` for batches of 64.
        pretrained: whether to load the weights shipped for CIFAR-10.

    Raises:
        InputError: unknown `branches` or `target`, or pretrained weights that do not ship or for a number of classes
            other than 10.
    """
    check_known("branches", branches, ("designed", *_PLACES))
    if branches == "designed":
        net = designed(AlexNet(num_classes), _DESIGNS, target, (3, 32, 32))
        return load_shipped(net, f"b_alexnet-{target}-cifar10", num_classes) if pretrained else net
    early, late = _PLACES[branches]
    net = BranchyNet(
        AlexNet(num_classes),
        {_TAPS[early][0]: _branch(early, 2, num_classes), _TAPS[late][0]: _branch(late, 1, num_classes)},
    )
    return load_shipped(net, f"b_alexnet-{branches}-cifar10", num_classes) if pretrained else net


def _branch(place: int, convolutions: int, num_classes: int) -> nn.Sequential:
    """The branch after convolution `place`: one or two 3x3 convolutions to 32 channels, pooling, linear."""
    _, channels, side = _TAPS[place]
    layers: list[nn.Module] = []
    if place == 3:
        layers += [_pool(), LocalResponseNorm(channels)]
        side //= 2
    layers.append(nn.Conv2d(channels, 32, 3, padding=1))
    if convolutions == 2:
        layers += [nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)]
    layers += [_pool(), nn.ReLU(), nn.Flatten(), nn.Linear(32 * (side // 2) ** 2, num_classes)]
    return initialize(nn.Sequential(*layers))
