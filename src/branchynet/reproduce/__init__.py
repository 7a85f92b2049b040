"""The paper's evaluation, made again: Table I, Figures 3 and 4, from shipped weights or from nothing."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..data import load_data
from ..errors import InputError
from ..files import replacing, write_json
from ..machine import environment
from . import table1
from .figures import figure_3, figure_4
from .measured import Measured, measured
from .recipes import Recipe, Training, recipes, shipped

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
    """Make Table I, Figure 3, Figure 4 or all of them again.

    Thresholds are chosen on validation images and judged on test images, in ONNX Runtime on one thread at batch 1, with
    everything timed; GPU rows are added where there is one.

    Args:
        what: ``"table1"``, ``"fig3"``, ``"fig4"`` or ``"all"``.
        output: a folder for ``table1.md``, and for each of them ``.json``, with ``.png`` and ``.svg`` pictures.
        networks: which, by name, with commas between, or ``"all"``.
        from_nothing: train them, in ``output/training``; stopped and called again, it goes on where it was.
        precision: of that training, as `fit` takes it.
        samples: how many test images are timed, in each of several passes.
        repeats: how many passes.
        say: called with a line now and then.

    Returns:
        One line a network, ours beside the published.

    Raises:
        InputError: an unknown name, no weights ship, or Figure 4 without its network.
        DataError: the data set is not where it is looked for.
    """
    if what not in (*WHAT, "all"):
        raise InputError(f"unknown {what!r}; make one of {', '.join(WHAT)} again, or all")
    wanted = WHAT if what == "all" else (what,)
    chosen = recipes(networks)
    if what == "fig4":
        chosen = [recipe for recipe in chosen if recipe.name == FIG_4]
        if not chosen:
            raise InputError(f"Figure 4 is about {FIG_4}, which is not among {networks!r}")
    folder = Path(output)
    judged = []
    for recipe in chosen:
        data = load_data(recipe.data)
        if from_nothing:
            nets = Training(recipe, data, folder / "training" / recipe.name, precision=precision).all()
        else:
            nets = shipped(recipe)
        judged.append(measured(recipe, nets, data, samples=samples, repeats=repeats, say=say))
    about = {"environment": environment(), "timed": {"samples": samples, "repeats": repeats, "threads": 1, "batch": 1}}
    tables = [table1.rows(found) for found in judged]
    if "table1" in wanted:
        write_json(folder / "table1.json", {"command": _command("table1", networks), **about, "networks": tables})
        with replacing(folder / "table1.md") as temporary:
            temporary.write_text(table1.table(tables) + "\n", encoding="utf-8")
    if "fig3" in wanted:
        _pictures(folder, "fig3", [figure_3(found) for found in judged], judged, about, networks)
    if "fig4" in wanted:
        alexnets = [found for found in judged if found.recipe.name == FIG_4]
        _pictures(folder, "fig4", [figure_4(found) for found in alexnets], alexnets, about, networks)
    return [table1.compared(row) for row in tables]


def _pictures(
    folder: Path, name: str, made: Sequence[tuple[dict[str, Any], Any]], judged: Sequence[Measured],
    about: dict[str, Any], networks: str,
) -> None:  # fmt: skip
    for (_, picture), found in zip(made, judged, strict=True):
        for kind in ("png", "svg"):
            with replacing(folder / f"{name}-{found.recipe.name}.{kind}") as temporary:
                picture.savefig(temporary, format=kind)
    command = _command(name, networks)
    write_json(folder / f"{name}.json", {"command": command, **about, "networks": [data for data, _ in made]})


def _command(what: str, networks: str) -> str:
    return f"branchynet reproduce {what} --networks {networks}"


__all__ = ["Measured", "Recipe", "Training", "reproduce"]
