"""Networks of the paper, with and without branches, and their trained weights."""

from collections.abc import Callable
from functools import partial

from ..extras import needed_by

with needed_by("branchynet.zoo"):
    from ..nn.network import BranchyNet
    from .alexnet import alexnet, b_alexnet
    from .lenet import b_lenet, lenet
    from .resnet import b_resnet, resnet

# The networks with branches where the paper has them, by name, as `train --network` takes them; `design` moves them.
NETWORKS: dict[str, Callable[..., BranchyNet]] = {
    "b_lenet": partial(b_lenet, branches="published"),
    "b_alexnet": partial(b_alexnet, branches="text"),
    **{f"b_resnet{n}": partial(b_resnet, n, branches="published") for n in (20, 32, 56, 110)},
}

__all__ = ["NETWORKS", "alexnet", "b_alexnet", "b_lenet", "b_resnet", "lenet", "resnet"]
