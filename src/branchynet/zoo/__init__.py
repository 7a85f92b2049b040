"""Networks of the paper, with and without branches, and their trained weights."""

from .alexnet import alexnet, b_alexnet
from .lenet import b_lenet, lenet
from .resnet import b_resnet, resnet

__all__ = ["alexnet", "b_alexnet", "b_lenet", "b_resnet", "lenet", "resnet"]
