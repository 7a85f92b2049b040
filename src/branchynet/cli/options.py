"""Options of the command line, and the parsers of their values."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from ..files import check_path

# Repeated here so that --help and completion do not import torch; a test compares them with their sources.
LAYOUTS = ("nested", "stages")
RUNTIMES = ("onnxruntime", "openvino", "onnxruntime-cuda")
TARGET_RUNTIMES = (*RUNTIMES, "torch", "torch-cuda")
NETWORKS = (
    "b_lenet",
    "b_lenet-published",
    "b_alexnet",
    "b_alexnet-published",
    "b_resnet110",
    "b_resnet20-published",
    "b_resnet32-published",
    "b_resnet56-published",
    "b_resnet110-published",
)
DATA = ("digits", "mnist", "fashion-mnist", "cifar10")
AUGMENTS = ("none", "shift", "affine", "flip-crop")
SCORES = ("entropy", "max_probability", "margin", "patience", "agreement", "learned")


def named(help: str, *names: str, **more: Any) -> Any:
    """An option with named values, which the shell completes; ``{}`` in `help` is replaced by the names."""
    complete: Callable[[str], list[str]] = lambda incomplete: [n for n in names if n.startswith(incomplete)]  # noqa: E731
    return typer.Option(help=help.format(", ".join(names)), autocompletion=complete, **more)


def path(text: str) -> Path:
    """Parse a path. Raises `FileError` if it is empty."""
    check_path(text)
    return Path(text)


def fraction(text: str | float) -> float:
    """Parse a limit: ``0.005`` or ``0.5%``."""
    share = str(text).strip()
    try:
        return float(share.removesuffix("%")) / (100 if share.endswith("%") else 1)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number; give a fraction, such as 0.005, or 0.5%") from None


def confidence(text: str | float) -> float:
    """Parse the confidence of a promise; for none there is ``--no-promise``."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number; give one such as 0.95, or --no-promise") from None


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.", parser=path)]
ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A file or folder that export wrote, or a run folder.", parser=path)
]
Size = Annotated[
    str, typer.Option(help="Size of a folder's images: 64, or 48x64 (height x width). Default: the median of each.")
]
Split = Annotated[str, typer.Option(help="Shares of a folder for training, validation and test. Default: 70/15/15.")]


def _limit(help: str) -> Any:
    return typer.Option(help=help, parser=fraction, metavar="FRACTION")


Accuracy = Annotated[float | None, _limit("Lowest accuracy.")]
Disagreement = Annotated[float | None, _limit("Largest share of samples whose class differs from the last exit's.")]
Confidence = Annotated[
    float,
    typer.Option(
        help="Confidence that an accuracy limit holds for unseen data.", parser=confidence, metavar="FRACTION"
    ),
]
Drop = Annotated[float | None, _limit("Largest drop of accuracy below the last exit's.")]
DropOfPlain = Annotated[float, _limit("Largest drop of accuracy below the plain network's.")]
Plain = Annotated[
    bool,
    typer.Option(help="Train the plain network for as many epochs, as a baseline; if not, it is the warm start."),
]
Thresholds = Annotated[
    str, named("How callers pass the thresholds: default (optional) or input (required).", "default", "input")
]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Allow a folder from elsewhere to call the function that it names as its network."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from ..environment import __version__

        print(f"branchynet {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
]


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Run a command that can be resumed; on Ctrl-C, print how to resume it."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to resume from the last complete epoch", file=sys.stderr)
        raise


def numbers(text: str, kind: Any) -> list[Any]:
    """Parse numbers such as ``1,64``. Raises `InputError`."""
    try:
        return [kind(part) for part in text.split(",")] if text.strip() else []
    except ValueError as error:
        raise InputError(f"{text!r} is not a list of numbers; write them as 1,64") from error


def image_size(text: str) -> tuple[int, int] | None:
    """Parse ``64`` or ``48x64`` as `(H, W)`; None if empty. Raises `InputError`."""
    if not text.strip():
        return None
    found = re.fullmatch(r"\s*(\d{1,9})\s*(?:[xX,]\s*(\d{1,9})\s*)?", text, re.ASCII)
    size = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if min(size) < 1:
        raise InputError(f"size={text!r} is not a size; give one side, such as 64, or height and width, such as 48x64")
    return size


def file_options(layout: str, thresholds: str, free: str) -> dict[str, Any]:
    """Parse the options of `export`. Raises `InputError`."""
    if layout not in LAYOUTS:
        raise InputError(f"layout must be nested or stages; got {layout!r}")
    if thresholds not in ("default", "input"):
        raise InputError(f"thresholds must be default or input; got {thresholds!r}")
    if free not in ("batch", "none"):
        raise InputError(
            f"free must be batch or none; got {free!r}: a file with a free batch reads batches of any size, and "
            "`branchynet bench --batch 8` times it with 8"
        )
    return {"layout": layout, "thresholds": thresholds, "free": free}


def shares(text: str) -> tuple[float, float, float] | None:
    """Parse ``70/15/15`` as three numbers; None if empty. Raises `InputError`."""
    if not text.strip():
        return None
    try:
        train, val, test = (float(part) for part in re.split("[/,]", text))
    except ValueError as error:
        raise InputError(
            f"split={text!r} is not a split; give three numbers, for training, validation and test, such as 70/15/15"
        ) from error
    return train, val, test
