"""The program `branchynet`: runs the verbs and reports their errors."""

import io
import os
import sys
import warnings
from typing import Any

import typer
from rich.console import Console

from ..errors import BranchyNetError, printable
from ..extras import needed_by
from . import exporting as exporting  # adds its verb
from . import serving as serving  # adds its verb
from .verbs import app


def main() -> None:
    """Run the command line. Warnings and a `BranchyNetError`, which exits with status 1, go to standard error."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # the terminal's encoding may lack characters of names
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with needed_by("this command"), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app(prog_name="branchynet")
    except BranchyNetError as error:
        _print("error", str(error), "red")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _print("warning", " ".join(str(message).split()), "yellow")


def _print(kind: str, message: str, style: str) -> None:
    """Print a message about Python arguments in terms of the options of the called command, on standard error."""
    from ..report.console import in_options

    message = in_options(message, called_options(app, sys.argv[1:]))
    message = f"{kind}: " + "\n".join(map(printable, message.splitlines()))
    Console(stderr=True).print(message, style=style, highlight=False, markup=False, soft_wrap=True)


def called_options(app: typer.Typer, arguments: list[str]) -> dict[str, str]:
    """The option of each parameter of the called command; in some commands `batch_size` is ``--batch``."""
    commands = getattr(typer.main.get_command(app), "commands", {})
    called = next((commands[word] for word in arguments if word in commands), None)
    named = {p.name: p.opts[0] for p in (called.params if called else ()) if p.param_type_name == "option"}
    return {"batch_size": "--batch", **named} if "batch" in named else named
