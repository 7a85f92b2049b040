"""Open, create, configure and load run folders."""

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..data import ImageData, loader
from ..data.datasets import FOLDER, folder_path
from ..deploy.staged_files import MANIFEST
from ..environment import environment
from ..errors import FileError, InputError
from ..files import check_folder, write_json
from ..nn.network import BranchyNet
from ..nn.weights import load_weights
from ..stored_values import read_entry
from ..training.history import History
from .settings import AUGMENTS, Settings, build_network, check_settings, data_of
from .trusted_functions import check_trust, remember

EVAL_BATCH = 500
MAY_GROW = ("epochs", "plain")


@dataclass(frozen=True)
class Run:
    """A run folder and the settings that made it."""

    path: Path
    settings: Settings

    def file(self, name: str, made_by: str) -> Path:
        """The path of a file of the run. Raises `FileError` if it is missing; `made_by` is the command to run first."""
        path = self.path / name
        if not path.is_file():
            raise FileError(f"{self.path} has no {name} yet; run `branchynet {made_by} {self.path}` first")
        return path


def open_run(path: str | os.PathLike[str], *, trust: bool = False) -> Run:
    """Open a run folder.

    `trust` allows the folder to run the function that it names as its network, now and later. The function of a folder
    from elsewhere may do anything. A folder that you made yourself is trusted until it is moved or copied, or the
    function's module changes in the current folder. Raises `FileError` if the folder holds no run, and `InputError` if
    it names a function and is not trusted to run it.
    """
    settings = settings_in(path)
    if ":" in settings.network:
        check_trust(path, settings.network, trust)
    return Run(Path(path), settings)


def settings_in(path: str | os.PathLike[str]) -> Settings:
    """The settings that a folder holds. Raises `FileError`."""
    check_folder(path)
    check_no_stages(path)
    config = Path(path) / "config.json"
    if not config.is_file():
        raise FileError(f"{path} is not a run folder (it has no config.json); make one with `branchynet train {path}`")
    return read_entry(config, "settings", Settings, f"`branchynet train {path}` after you remove that folder")


def check_no_stages(path: str | os.PathLike[str]) -> None:
    """Raise `FileError` for a folder that ``export(..., layout="stages")`` wrote."""
    if (Path(path) / MANIFEST).exists():
        raise FileError(f"{path} holds the exported stages of a network, not a run; give the folder of the run")


def create_run(path: str | os.PathLike[str], settings: Settings) -> Run:
    """Create a run in a folder, or open the run of the same settings in it. Writes nothing.

    Before its first epoch, a run accepts any settings. After it, a run accepts more epochs, a plain network to compare
    with, and the new path of a folder of images that has moved. Raises `InputError` for other settings or one that is
    out of range, and `DataError` for a folder of images that does not exist.
    """
    check_settings(settings)
    check_folder(path)
    check_no_stages(path)
    if settings.data.startswith(FOLDER):
        settings = replace(settings, data=f"{FOLDER}{folder_path(settings.data)}")  # its absolute path
    if (Path(path) / "config.json").exists() and is_trained(Path(path)):
        made = asdict(settings_in(path))
        if made["data"].startswith(FOLDER) and settings.data.startswith(FOLDER):
            made["data"] = settings.data  # it may have moved: `check_data` compares the images themselves
        other = [
            f"{k} {made[k]!r}, not {v!r}"
            for k, v in asdict(settings).items()
            if made[k] != v and not (k in MAY_GROW and v > made[k])
        ]
        if other:
            raise InputError(
                f"{path} was trained with {'; '.join(other)}: use these settings, or another folder (you can train a "
                "run for more epochs, but not change anything else)"
            )
    return Run(Path(path), settings)


def is_trained(path: Path) -> bool:
    """Whether a folder holds at least one epoch of training."""
    histories = (path / part / "train.csv" for part in (".", "warm-start", "plain"))
    return any(History.load(file).rows for file in histories if file.exists())


def configure(run: Run) -> None:
    """Write the configuration of a run before it trains, unless the folder holds the same one."""
    if ":" in run.settings.network:
        remember(run.path, run.settings.network)
    if not is_trained(run.path) or settings_in(run.path) != run.settings:
        write_json(run.path / "config.json", {"settings": asdict(run.settings), "environment": environment()})


def loaders(settings: Settings, data: ImageData) -> tuple[Any, Any]:
    """The training loader, augmented and shuffled, and the validation loader."""
    augment = AUGMENTS[settings.augment]
    return loader(data.train, settings.batch_size, shuffle=True, augment=augment), loader(data.val, EVAL_BATCH)


def load_run(run: Run) -> tuple[BranchyNet, ImageData]:
    """The trained network of a run, in evaluation mode, and its data."""
    weights = run.file("checkpoint.safetensors", "train")
    data = data_of(run.settings)
    net = build_network(run.settings, data)
    load_weights(net, weights)
    return net.eval(), data
