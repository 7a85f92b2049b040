"""How each of the paper's networks, and the plain networks to compare it with, are trained.

The first part trains a plain network from scratch. The second part starts from its weights and trains two networks for
the same epochs with the same augmentation: the network with branches (joint) and the plain network (continued). Epochs
that train only the branches on the frozen network are not counted, because they do not train the trunk. Smaller plain
networks, an alternative to early exits, are trained for the same epochs in the same two parts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import zoo
from ..data import Augment, ImageData, ProgressiveLoader, affine, flip_crop, loader
from ..errors import InputError
from ..nn.network import BranchyNet
from ..nn.weights import load_weights
from ..training.loop import fit
from ..training.options import FitOptions
from ..training.schedules import Cosine
from ..zoo.alexnet import AlexNet
from ..zoo.lenet import LeNet
from ..zoo.weights import load_shipped

Make = Callable[[], nn.Module]

COSINE = Cosine()


def adam(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    """Adam, as in the paper; `lr` is the highest learning rate of the schedule."""
    return partial(torch.optim.Adam, lr=lr)


def sgd(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    """SGD with Nesterov momentum and weight decay; `lr` is the highest learning rate of the schedule."""
    return partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


@dataclass(frozen=True)
class Recipe:
    """A network of the paper, and how it is trained.

    `slack` holds further drops of validation accuracy below the plain network's at which thresholds are chosen.
    Negative values ask for more accuracy, because thresholds usually do better on the images used to choose them.
    """

    name: str  # of the network with branches, in files
    title: str  # and in text
    data: str
    plain: Callable[..., nn.Module]  # with ``pretrained=True``, with shipped weights; likewise `branchy`
    branchy: Callable[..., BranchyNet]
    optimizer: Callable[[float], Callable[[Any], torch.optim.Optimizer]]  # of a learning rate, as `fit` needs it
    weights: tuple[str, str]  # names of the shipped weights, with and without branches
    epochs: tuple[int, int]  # of the two parts; 0 for none
    lrs: tuple[float, float]  # highest learning rates of the two parts
    batch: int = 128
    augment: Augment | None = None
    schedule: Cosine = COSINE
    smaller: tuple[tuple[str, Make, str], ...] = ()  # name, maker and shipped weights of smaller plain networks
    slack: tuple[float, ...] = ()
    warm: tuple[int, float] | None = None  # epochs and highest learning rate of the branches alone, before part two
    sides: tuple[int, ...] = ()  # height and width of the images in the first epochs of part one; empty for full size
    distill: float = 0.0

    @property
    def plain_title(self) -> str:
        """The name of the plain network in text."""
        return self.title.removeprefix("B-")

    @property
    def baseline(self) -> str:
        """The name of the shipped weights of the plain network after the first part."""
        return self.weights[1].replace("-", "_baseline-", 1) if self.epochs[1] else self.weights[1]


_LENETS = tuple(
    (f"LeNet {a}-{b}-{c}", partial(LeNet, channels=(a, b, c)), f"lenet_{a}_{b}_{c}-mnist")
    for a, b, c in ((2, 4, 8), (3, 6, 12), (4, 8, 16))
)
_ALEXNETS = (
    ("AlexNet, 1/2 width", partial(AlexNet, 10, (16, 32, 48, 48, 32), (128, 64)), "alexnet_1_2-cifar10"),
    ("AlexNet, 3/4 width", partial(AlexNet, 10, (24, 48, 72, 72, 48), (192, 96)), "alexnet_3_4-cifar10"),
)
_RESNETS = tuple((f"ResNet-{n}", partial(zoo.resnet, n), f"resnet{n}-cifar10") for n in (20, 32, 56))

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "b_lenet", "B-LeNet", "mnist", zoo.lenet, partial(zoo.b_lenet, branches="published"), adam,
            ("b_lenet-mnist", "lenet-mnist"), epochs=(10, 25), lrs=(5e-3, 5e-3), batch=256,
            augment=affine(degrees=10, translate=2 / 28, scale=0.1), smaller=_LENETS,
            slack=(-0.001,),  # one standard error of 10,000 images
        ),
        Recipe(
            "b_alexnet", "B-AlexNet", "cifar10", zoo.alexnet, partial(zoo.b_alexnet, branches="text"), adam,
            ("b_alexnet-text-cifar10", "alexnet-cifar10"), epochs=(90, 30), lrs=(1e-3, 1e-3),
            augment=flip_crop(4), schedule=Cosine(warmup=0.15), smaller=_ALEXNETS, distill=1.0,
            slack=(-0.005, -0.01),  # one and two standard errors of 5,000 images
        ),
        Recipe(
            "b_resnet110", "B-ResNet-110", "cifar10", partial(zoo.resnet, 110),
            partial(zoo.b_resnet, 110, branches="published"), sgd,
            ("b_resnet110-cifar10", "resnet110-cifar10"), epochs=(11, 0), lrs=(0.05, 0.0), batch=64,
            augment=flip_crop(4), schedule=Cosine(warmup=0.15), smaller=_RESNETS, slack=(0.003,),
            warm=(5, 0.005), sides=(16, 16, 16, 16, 24, 24, 24, 32), distill=1.0,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class TrainedNetwork:
    """The network with branches, the plain one and smaller plain ones by name, all trained for the same epochs."""

    branchy: BranchyNet
    plain: nn.Module
    smaller: dict[str, nn.Module]


def shipped(recipe: Recipe) -> TrainedNetwork:
    """Return the networks of a recipe with shipped weights. Raises `InputError` if they do not ship."""
    smaller = {name: load_shipped(make(), weights, 10) for name, make, weights in recipe.smaller}
    return TrainedNetwork(recipe.branchy(pretrained=True), recipe.plain(pretrained=True), smaller)


@dataclass(frozen=True)
class Training:
    """The training of the networks of a recipe."""

    recipe: Recipe
    data: ImageData
    folder: Path  # for state and history of every part; trained parts are loaded from it
    seed: int = 0  # of weights, order and augmentation
    precision: str = "no"  # mixed precision, as in `FitOptions`
    progress: bool = True
    start: Path | None = None  # weights of a plain network that replace the first part

    def baseline(self) -> nn.Module:
        """The plain network after the first part. Raises `FileError` if `start` holds another network."""
        if self.start is None:
            return self._begin(self.recipe.plain, "baseline")
        net = self.recipe.plain()
        load_weights(net, self.start)
        return net

    def continued(self) -> nn.Module:
        """The plain network after both parts."""
        return self._go_on(self.baseline(), "continued")

    def joint(self) -> BranchyNet:
        """The network with the paper's branches after both parts."""

        def with_branches(baseline: nn.Module) -> BranchyNet:
            branchy = self.recipe.branchy()
            branchy.backbone.load_state_dict(baseline.state_dict())
            return branchy

        return self.with_exits(with_branches, "joint")

    def with_exits(self, add: Callable[[nn.Module], BranchyNet], run: str) -> BranchyNet:
        """The network with the exits that `add` attaches, after both parts; `run` is the folder of its state."""
        baseline = self.baseline()
        torch.manual_seed(self.seed)
        branchy = add(baseline)
        recipe = self.recipe
        if recipe.warm is not None:
            self._fit(branchy, *recipe.warm, self.seed, f"{run}-warm", train="branches", distill=recipe.distill)
        self._fit(branchy, recipe.epochs[1], recipe.lrs[1], 100 + self.seed, run, distill=recipe.distill)
        return branchy

    def smaller(self) -> Iterator[tuple[str, nn.Module]]:
        """Each smaller network after both parts, by the name of its weights."""
        for _, make, weights in self.recipe.smaller:
            yield weights, self._go_on(self._begin(make, f"{weights}/baseline"), f"{weights}/continued")

    def all(self) -> TrainedNetwork:
        """All networks; takes hours for AlexNet, and a day for ResNet-110 on one core."""
        branchy, plain = self.joint(), self.continued()
        smaller = zip(self.recipe.smaller, self.smaller(), strict=True)
        return TrainedNetwork(branchy.eval(), plain.eval(), {title: net.eval() for (title, *_), (_, net) in smaller})

    def _begin(self, make: Make, run: str) -> nn.Module:
        torch.manual_seed(self.seed)
        return self._fit(make(), self.recipe.epochs[0], self.recipe.lrs[0], self.seed, run, sides=self.recipe.sides)

    def _go_on(self, net: nn.Module, run: str) -> nn.Module:
        return self._fit(net, self.recipe.epochs[1], self.recipe.lrs[1], 100 + self.seed, run)

    def _fit(
        self, net: nn.Module, epochs: int, lr: float, seed: int, run: str,
        train: str = "all", sides: tuple[int, ...] = (), distill: float = 0.0,
    ) -> nn.Module:  # fmt: skip
        recipe = self.recipe
        if not epochs:
            return net
        batches = loader(self.data.train, recipe.batch, shuffle=True, augment=recipe.augment)
        if self.progress:
            print(f"{recipe.title}, {run}: {epochs} epochs", flush=True)
        fit(
            net,
            ProgressiveLoader(batches, sides) if sides else batches,
            loader(self.data.val, 500),
            epochs=epochs,
            train=train,
            distill=distill,
            optimizer=recipe.optimizer(lr),
            run=self.folder / run,
            progress=self.progress,
            options=FitOptions(seed=seed, mixed_precision=self.precision, channels_last=True, schedule=recipe.schedule),
        )
        return net


def recipes(names: str) -> list[Recipe]:
    """Return the recipes named in ``"b_lenet,b_alexnet"`` or ``"all"``. Raises `InputError` for unknown names."""
    if names.strip() == "all":
        return list(RECIPES.values())
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in RECIPES]
    if unknown or not wanted:
        what = f"unknown network {unknown[0]!r}" if unknown else "no network is named"
        raise InputError(f"{what}; give one or more of {', '.join(RECIPES)}")
    return [RECIPES[name] for name in wanted]
