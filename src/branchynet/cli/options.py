"""What options of the command line take: names, lists of numbers, sizes of images, shares of a split."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from ..files import check_path

# Written out so that --help and completion need no torch; a test compares them with their sources.
RUNTIMES = ("onnxruntime", "openvino", "onnxruntime-cuda")
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
SCORES = ("entropy", "max_probability", "margin", "patience", "learned")


def named(help: str, *names: str, **more: Any) -> Any:
    """An option whose values have names, which the shell completes; ``{}`` in `help` stands for them."""
    complete: Callable[[str], list[str]] = lambda incomplete: [n for n in names if n.startswith(incomplete)]  # noqa: E731
    return typer.Option(help=help.format(", ".join(names)), autocompletion=complete, **more)


def path(text: str) -> Path:
    """The parser of all paths. Raises `FileError` for an empty one."""
    check_path(text)
    return Path(text)


def fraction(text: str | float) -> float:
    """The parser of limits: ``0.005`` or ``0.5%``."""
    share = str(text).strip()
    try:
        return float(share.removesuffix("%")) / (100 if share.endswith("%") else 1)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number; give a fraction, such as 0.005, or 0.5%") from None


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.", parser=path)]
ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A .onnx file that export wrote, or a run's folder.", parser=path)
]
Size = Annotated[str, typer.Option(help="Of a folder's images: 64, or 48x64 high and wide; by default their median.")]
Split = Annotated[
    str, typer.Option(help="Shares of a folder's images to train on, choose on and test on; by default 70/15/15.")
]


def _limit(help: str) -> Any:
    return typer.Option(help=help, parser=fraction, metavar="FRACTION")


Accuracy = Annotated[float | None, _limit("Accuracy at least this.")]
Disagreement = Annotated[float | None, _limit("Another class than the last exit's for at most this share.")]
Drop = Annotated[float | None, _limit("Accuracy at most this far below the last exit's.")]
DropOfPlain = Annotated[float, _limit("Accuracy at most this far below the plain network's.")]
Plain = Annotated[
    bool, typer.Option(help="Also train the plain network on as long, to compare with; else with the warm start.")
]
Thresholds = Annotated[str, named("default: optional inputs; input: required inputs.", "default", "input")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Run the function that a folder from elsewhere names as its network.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


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
    """Run a command that can be resumed; on Ctrl-C, say that the same command resumes it."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last whole epoch", file=sys.stderr)
        raise


def numbers(text: str, kind: Any) -> list[Any]:
    """The numbers in text such as ``1,64``. Raises `InputError`."""
    try:
        return [kind(part) for part in text.split(",")] if text.strip() else []
    except ValueError as error:
        raise InputError(f"{text!r} is no list of numbers; write them as 1,64") from error


def image_size(text: str) -> tuple[int, int] | None:
    """`(H, W)` of ``64`` or ``48x64``; None of empty text. Raises `InputError`."""
    if not text.strip():
        return None
    found = re.fullmatch(r"\s*(\d{1,9})\s*(?:[xX,]\s*(\d{1,9})\s*)?", text, re.ASCII)
    size = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if min(size) < 1:
        raise InputError(f"size={text!r} is no size; give one side, such as 64, or height and width, such as 48x64")
    return size


def shares(text: str) -> tuple[float, float, float] | None:
    """The three numbers of ``70/15/15``; None of empty text. Raises `InputError`."""
    if not text.strip():
        return None
    try:
        train, val, test = (float(part) for part in re.split("[/,]", text))
    except ValueError as error:
        raise InputError(
            f"split={text!r} is no split; give three numbers, for training, validation and test, such as 70/15/15"
        ) from error
    return train, val, test
