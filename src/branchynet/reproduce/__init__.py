"""Reproduction of the paper's Table I and Figures 3 and 4, with shipped weights or trained from scratch."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..data import load_data
from ..environment import environment
from ..errors import InputError
from ..files import check_path, read_json, replacing, write_json
from ..reproduce import table1
from ..stored_values import read_entry
from .figures import figure_3, figure_4
from .recipes import RECIPES, Recipe, Training, recipes, shipped
from .results import NetworkResult, evaluate_network

WHAT = ("table1", "fig3", "fig4")
FIG_4 = "b_alexnet"


def reproduce(
    what: str,
    output: str | os.PathLike[str],
    *,
    networks: str = "all",
    from_nothing: bool = False,
    precision: str = "no",
    samples: int = 512,
    repeats: int = 7,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Reproduce Table I, Figure 3, Figure 4 or all of them.

    Thresholds are chosen on validation images and evaluated on test images, in ONNX Runtime on one thread at batch 1.
    Every operation is timed. If there is a GPU, rows for it are added. Results of other networks in `output` are kept
    if this machine made them with the same versions.

    Args:
        what: ``"table1"``, ``"fig3"``, ``"fig4"`` or ``"all"``.
        output: folder for the results: ``table1.md``, one ``.json`` per table or figure, and figures as ``.png`` and
            ``.svg``.
        networks: names of networks, separated by commas, or ``"all"``.
        from_nothing: whether to train the networks, in ``output/training``; resumes if it was interrupted.
        precision: mixed precision of that training, as in `FitOptions`.
        samples: number of test images that are timed in each pass.
        repeats: number of passes.
        say: called with progress messages.

    Returns:
        One line per network, which compares the result with the paper's.

    Raises:
        InputError: an unknown name, weights that do not ship, or Figure 4 without its network.
        DataError: the data set is missing.
    """
    if what not in (*WHAT, "all"):
        raise InputError(f"unknown {what!r}; give one of {', '.join(WHAT)}, or all")
    wanted = WHAT if what == "all" else (what,)
    chosen = [recipe for recipe in recipes(networks) if what != "fig4" or recipe.name == FIG_4]
    if not chosen:
        raise InputError(f"Figure 4 needs {FIG_4}, which is not among {networks!r}")
    check_path(output)
    folder = Path(output)
    about = {"environment": environment(), "timed": {"samples": samples, "repeats": repeats, "threads": 1, "batch": 1}}
    lines = []
    for recipe in chosen:
        data = load_data(recipe.data)
        training = Training(recipe, data, folder / "training" / recipe.name, precision=precision)
        nets = training.all() if from_nothing else shipped(recipe)
        found = evaluate_network(recipe, nets, data, samples=samples, repeats=repeats, say=say)
        row = table1.rows(found)
        if "table1" in wanted:
            stored = _write(folder, "table1", row, about)
            with replacing(folder / "table1.md") as temporary:
                temporary.write_text(table1.table(stored) + "\n", encoding="utf-8")
        if "fig3" in wanted:
            _picture(folder, "fig3", *figure_3(found), about)
        if "fig4" in wanted and recipe.name == FIG_4:
            _picture(folder, "fig4", *figure_4(found), about)
        lines.append(table1.compared(row))
    return lines


def _picture(folder: Path, what: str, row: dict[str, Any], picture: Figure, about: dict[str, Any]) -> None:
    for kind in ("png", "svg"):
        with replacing(folder / f"{what}-{row['name']}.{kind}") as temporary:
            picture.savefig(temporary, format=kind)
    _write(folder, what, row, about)


def _write(folder: Path, what: str, row: dict[str, Any], about: dict[str, Any]) -> list[dict[str, Any]]:
    """Write one network's row, keep the rows of others made in the same way, and return all rows."""
    path = folder / f"{what}.json"
    stored = read_json(path) if path.exists() else None
    comparable = isinstance(stored, dict) and all(stored.get(key) == value for key, value in about.items())
    earlier = read_entry(path, "networks", list[dict[str, Any]], "`branchynet reproduce`") if comparable else []
    every = {one.get("name"): one for one in (*earlier, row)}
    names = [name for name in RECIPES if name in every]
    networks = [every[name] for name in names]
    command = f"branchynet reproduce {what} --networks {','.join(names)}"
    write_json(path, {"command": command, **about, "networks": networks})
    return networks


__all__ = ["NetworkResult", "Recipe", "Training", "reproduce"]
