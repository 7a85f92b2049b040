"""LeNet and B-LeNet for 28 x 28 grey images, layer for layer as in the paper's released code.

Both take pixels in [0, 1], `(B, 1, 28, 28)` float32, and give logits `(B, 10)`.
"""

from torch import Tensor, nn

from ..net import BranchyNet


def _pool() -> nn.Sequential:
    # Pooling rounds up, as in Chainer. ReLU after max-pooling, as published; the two commute.
    return nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.ReLU())


class LeNet(nn.Module):
    """The paper's LeNet: three 5x5 convolutions and two linear layers; 1.14 M multiply-accumulates."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 5, 5, padding=3)
        self.pool1 = _pool()
        self.conv2 = nn.Conv2d(5, 10, 5, padding=3)
        self.pool2 = _pool()
        self.conv3 = nn.Conv2d(10, 20, 5, padding=3)
        self.pool3 = _pool()
        # No non-linearity between the linear layers, as published.
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(720, 84), nn.Linear(84, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, num_classes)`."""
        x = self.pool1(self.conv1(x))
        x = self.pool2(self.conv2(x))
        x = self.pool3(self.conv3(x))
        return self.classifier(x)


def lenet(num_classes: int = 10) -> LeNet:
    """LeNet, untrained."""
    return LeNet(num_classes)


def b_lenet(num_classes: int = 10) -> BranchyNet:
    """B-LeNet, untrained: LeNet with the paper's branch on the first convolution's raw output; 2 exits."""
    branch = nn.Sequential(
        _pool(),
        nn.Conv2d(5, 10, 3, padding=1),
        _pool(),
        nn.Flatten(),
        nn.Linear(640, num_classes),
    )
    return BranchyNet(LeNet(num_classes), {"conv1": branch})
