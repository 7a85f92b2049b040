"""LeNet and B-LeNet for 28 x 28 gray images, with the layers of the paper's released code.

Inputs are pixels in [0, 1], `(B, 1, 28, 28)` float32; outputs are logits `(B, 10)`.
"""

from torch import Tensor, nn

from ..nn.network import BranchyNet
from .designs import check_known, designed
from .weights import load_shipped


def _pool() -> nn.Sequential:
    # Pooling rounds up, as in Chainer. ReLU after max-pooling, as published; the two commute.
    return nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.ReLU())


class LeNet(nn.Module):
    """The paper's LeNet: three 5x5 convolutions and two linear layers; 1.14 M multiply-accumulates.

    Fewer `channels` of the convolutions give smaller plain networks.
    """

    def __init__(self, num_classes: int = 10, channels: tuple[int, int, int] = (5, 10, 20)) -> None:
        super().__init__()
        first, second, third = channels
        self.conv1 = nn.Conv2d(1, first, 5, padding=3)
        self.pool1 = _pool()
        self.conv2 = nn.Conv2d(first, second, 5, padding=3)
        self.pool2 = _pool()
        self.conv3 = nn.Conv2d(second, third, 5, padding=3)
        self.pool3 = _pool()
        # No non-linearity between the linear layers, as published.
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(36 * third, 84), nn.Linear(84, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, num_classes)`."""
        x = self.pool1(self.conv1(x))
        x = self.pool2(self.conv2(x))
        x = self.pool3(self.conv3(x))
        return self.classifier(x)


def lenet(num_classes: int = 10, *, pretrained: bool = False) -> LeNet:
    """Return LeNet, untrained or with the weights shipped for MNIST.

    Raises:
        InputError: pretrained weights for a number of classes other than 10.
    """
    net = LeNet(num_classes)
    return load_shipped(net, "lenet-mnist", num_classes) if pretrained else net


# Exits designed by `advise`, by target; see benchmarks/experiments/design.py.
_DESIGNS = {
    "latency": {"input": "conv-16-32", "pool1": "conv-16-32", "pool3": "hidden-64"},
    "batch": {"input": "conv-16-32", "pool2": "hidden-64"},
}


def b_lenet(
    num_classes: int = 10, *, branches: str = "designed", target: str = "latency", pretrained: bool = False
) -> BranchyNet:
    """Return B-LeNet: LeNet with early exits.

    Args:
        num_classes: number of classes.
        branches: ``"designed"`` by `advise`; or ``"published"``, the paper's branch on the output of the first
            convolution (2 exits).
        target: ``"latency"`` for the design for batches of 1 (4 exits), or ``"batch"`` for batches of 64 (3 exits).
        pretrained: whether to load the weights shipped for MNIST.

    Raises:
        InputError: unknown `branches` or `target`, or pretrained weights for a number of classes other than 10.

    Example:
        >>> import torch
        >>> net = b_lenet(pretrained=True)
        >>> [tuple(logits.shape) for logits in net(torch.zeros(2, 1, 28, 28))]
        [(2, 10), (2, 10), (2, 10), (2, 10)]
    """
    check_known("branches", branches, ("designed", "published"))
    if branches == "designed":
        net, weights = designed(LeNet(num_classes), _DESIGNS, target, (1, 28, 28)), f"b_lenet-{target}-mnist"
    else:
        layers = (_pool(), nn.Conv2d(5, 10, 3, padding=1), _pool(), nn.Flatten(), nn.Linear(640, num_classes))
        net, weights = BranchyNet(LeNet(num_classes), {"conv1": nn.Sequential(*layers)}), "b_lenet-mnist"
    return load_shipped(net, weights, num_classes) if pretrained else net
