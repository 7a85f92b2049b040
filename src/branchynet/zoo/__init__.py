"""The networks of the paper, with and without branches, and their trained weights."""

from collections.abc import Callable
from functools import partial

from ..extras import needed_by

with needed_by("branchynet.zoo"):
    from ..nn.network import BranchyNet
    from .alexnet import alexnet, b_alexnet
    from .lenet import b_lenet, lenet
    from .resnet import b_resnet, resnet

NETWORKS: dict[str, Callable[..., BranchyNet]] = {
    "b_lenet": b_lenet,
    "b_lenet-published": partial(b_lenet, branches="published"),
    "b_alexnet": b_alexnet,
    "b_alexnet-published": partial(b_alexnet, branches="text"),
    "b_resnet110": partial(b_resnet, 110),
    **{f"b_resnet{n}-published": partial(b_resnet, n, branches="published") for n in (20, 32, 56, 110)},
}
"""Networks by name, as in `branchynet train --network`: with designed exits, and with the paper's branches."""

__all__ = ["NETWORKS", "alexnet", "b_alexnet", "b_lenet", "b_resnet", "lenet", "resnet"]
