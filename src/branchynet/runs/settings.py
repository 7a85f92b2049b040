"""The settings of a run, the checks before its first epoch, and the network that the settings name."""

import importlib
import inspect
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..argument_checks import MOST_SEED, above_zero, real, whole
from ..data import ImageData, affine, flip_crop, load_data, shift
from ..data.datasets import FOLDER
from ..errors import BranchyNetError, InputError, counted, nearest
from ..losses import joint_loss
from ..nn.attaching import attach_branches
from ..nn.calls import evaluating
from ..nn.network import BranchyNet
from ..training.context import accelerating
from ..training.options import PRECISIONS
from ..zoo import NETWORKS

AUGMENTS = {
    "none": None,
    "shift": shift(2),
    "affine": affine(degrees=10, translate=2 / 28, scale=0.1),
    "flip-crop": flip_crop(4),
}


@dataclass(frozen=True)
class Settings:
    """The settings of `train_run`; `size`, `split` and `normalize` are arguments of `load_data`."""

    network: str = "b_lenet"  # a name in `branchynet.zoo.NETWORKS`, or "package.module:function"
    data: str = "digits"  # a name of a data set, as in `load_data`
    warm_start_epochs: int = 10  # of the plain network, trained first; the exits start from its weights. 0 for none
    epochs: int = 25  # of joint training
    plain: bool = True  # whether to train the plain network for `epochs` more and compare with it, not the warm start
    train: str = "all"  # or "branches", as in `fit`
    loss_weights: tuple[float, ...] = ()  # one per exit; empty for all 1
    distill: float = 0.0  # weight of the distillation loss, as in `fit`
    augment: str = "affine"  # one of `AUGMENTS`
    batch_size: int = 128  # images per step
    lr: float = 3e-3  # the highest learning rate of Adam
    seed: int = 0  # of the weights, the order and the augmentation
    mixed_precision: str = "no"  # or "bf16" or "fp16", as in `FitOptions`
    compile: bool = False  # as in `FitOptions`
    taps: tuple[str, ...] = ()  # of early exits that replace those of the network
    branches: tuple[str, ...] = ()  # one name per tap, as in `branchynet.nn.branches.named_branches`
    size: tuple[int, int] | None = None
    split: tuple[float, float, float] | None = None
    normalize: bool = False

    @property
    def plain_epochs(self) -> int:
        """Number of epochs of the plain network that results are compared with."""
        return self.warm_start_epochs + self.epochs * self.plain

    @property
    def caveat(self) -> str:
        """A note for comparisons with a plain network that trained for fewer epochs; otherwise empty."""
        if self.plain:
            return ""
        if not self.warm_start_epochs:
            return "the plain network was never trained, so its accuracy is not shown: train without --no-plain"
        return (
            f"the plain network is the warm start, trained for {counted(self.warm_start_epochs, 'epoch')}; the network "
            f"with exits was trained for {self.epochs} more: train again with --plain for a fair comparison"
        )


def check_settings(settings: Settings) -> None:
    """Raise `InputError` for a value that cannot be trained with on this machine; reads no data."""
    for name, known in (("augment", AUGMENTS), ("mixed_precision", PRECISIONS)):
        if (value := getattr(settings, name)) not in known:
            raise InputError(f"unknown {name} {value!r}{nearest(value, known)}")
    if settings.mixed_precision != "no":
        with accelerating(settings.mixed_precision, None):  # raises if this machine lacks the precision
            pass
    for name, least in {"warm_start_epochs": 0, "epochs": 1, "batch_size": 1}.items():
        whole(name, getattr(settings, name), least)
    whole("seed", settings.seed, 0, MOST_SEED - 1)  # exits train with the next one
    above_zero("lr", settings.lr)
    if real("distill", settings.distill) < 0:
        raise InputError(f"distill must not be negative; got {settings.distill:g}")


def _cannot_read(settings: Settings, data: ImageData, error: Exception) -> InputError:
    """The error of a network that cannot read the images; for the zoo's networks it names a remedy."""
    shape, folder = tuple(data.shape), data.name.startswith(FOLDER)
    message = f"{settings.network} cannot read the images of {data.name}, of shape {shape}: "
    if settings.network not in NETWORKS:
        return InputError(f"{message}{error}")
    gray, reads_gray = shape[0] == 1, settings.network.startswith("b_lenet")
    other, side = ("b_lenet", 28) if gray else ("b_resnet20-published", 32)
    remedy = " ".join([f"network={other}"] * (reads_gray != gray) + [f"size={side}"] * folder)
    reads = "gray images of 28 x 28" if reads_gray else "color images of 32 x 32"
    return InputError(f"{message}it reads {reads}; give {remedy}, or a network of your own")


def build_network(settings: Settings, data: ImageData) -> BranchyNet:
    """Build the untrained network of `Settings` and check it on a few images.

    Raises `InputError` if the network cannot be built or cannot read the images, or if the number of outputs or loss
    weights is wrong.
    """
    example, labels = example_of(data), data.val.labels[:8]
    net = named_network(settings.network, len(data.classes))
    try:
        with torch.no_grad(), evaluating(net):
            net(example)
    except (RuntimeError, InputError) as error:  # from the backbone, or from a branch
        raise _cannot_read(settings, data, error) from error
    if settings.taps:
        net = attach_branches(net.backbone, settings.taps, settings.branches, example)
    if settings.train == "branches" and not len(net.branches):
        raise InputError(f"{settings.network} has no branches to train alone; attach some, or train the whole network")
    with torch.no_grad(), evaluating(net):
        outputs = net(example)
        for n, output in enumerate(outputs, 1):
            if output.ndim < 2 or output.shape[1] != len(data.classes):
                raise InputError(
                    f"exit {n} of {settings.network} gives outputs of shape {tuple(output.shape)} for {len(labels)} "
                    f"images, but {data.name} has {len(data.classes)} classes: build it for that number (a function "
                    "with a parameter num_classes receives it)"
                )
        joint_loss(outputs, labels, settings.loss_weights or None, distill=settings.distill)
    return net


def named_network(name: str, num_classes: int) -> BranchyNet:
    """Build a network of the zoo, or call the user's function that makes one. Raises `InputError`.

    The function receives the number of classes if it has a parameter ``num_classes``.
    """
    if name in NETWORKS:
        return NETWORKS[name](num_classes=num_classes)
    module, colon, function = name.partition(":")
    if module.endswith(".py") and function:
        dotted = module.removesuffix(".py").strip("./").replace("/", ".")
        raise InputError(f"{name!r} names a file; give its module, '{dotted}:{function}'")
    if not (module and colon and function):
        raise InputError(
            f"unknown network {name!r}{nearest(name, NETWORKS)}; for your own, give 'package.module:function'"
        )
    make = _imported(module, function)
    try:
        parameters = inspect.signature(make).parameters
        net = make(num_classes=num_classes) if "num_classes" in parameters else make()
    except BranchyNetError:
        raise
    except Exception as error:
        raise InputError(f"{name} failed at {_place(error)}: {type(error).__name__}: {error}") from error
    if not isinstance(net, BranchyNet):
        raise InputError(f"{name} returned a {type(net).__name__}; it must return a BranchyNet (see attach)")
    return net


def _imported(module: str, function: str) -> Any:
    """Import a function from an installed module or one in the current folder."""
    here = str(Path.cwd())
    if not {here, ""} & set(sys.path):
        sys.path.append(here)  # last, so that no file there shadows an installed package
    importlib.invalidate_caches()
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            raise InputError(
                f"there is no module {error.name!r}, neither installed nor in the current folder {here}: go to the "
                "folder where it is, or install its package"
            ) from error
        raise InputError(f"cannot import {module!r}: {error}") from error
    except Exception as error:
        raise InputError(f"cannot import {module!r}: {type(error).__name__} at {_place(error)}: {error}") from error
    make = getattr(found, function, None)
    if not callable(make):
        where = getattr(found, "__file__", None) or "built into Python"
        functions = [name for name, value in vars(found).items() if callable(value) and not name.startswith("_")]
        hint = nearest(function, functions) if functions else ""
        raise InputError(f"the module {module!r} ({where}) has no function {function!r}{hint}")
    return make


def _place(error: BaseException) -> str:
    """The file and line that raised an error."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"


def data_of(settings: Settings) -> ImageData:
    """Load the data set that `Settings` names. Raises as `load_data` does."""
    return load_data(settings.data, size=settings.size, split=settings.split, normalize=settings.normalize)


def example_of(data: ImageData) -> torch.Tensor:
    """Eight validation images, as network inputs."""
    return data.val.inputs(slice(8))
