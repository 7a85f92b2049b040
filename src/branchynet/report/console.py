"""Tables for the terminal, which never truncate numbers, and error messages in terms of options."""

import re
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from ..errors import counted, printable
from ..policy.exit_cost import ExitCost
from ..policy.values import PROMISED, STEADY, Choice

_FRAME = 3  # characters per column in addition to its content: a line and two spaces
_WORD = 16  # smallest width of a text column


def show(
    out: Console, columns: Mapping[str, bool], rows: Sequence[Sequence[str]], *, title: str = "", every: int = 0
) -> None:
    """Print a table; if the terminal is too narrow, print each row as lines of ``name: value``.

    `columns` tells whether a column holds text that may be wrapped; numbers are never wrapped. A log file gets the
    table at full width. A line is drawn after `every` rows.
    """
    rows = [tuple(printable(text) for text in row) for row in rows]
    whole = [max(map(cell_len, column)) for column in zip(columns, *rows, strict=True)]
    least = [min(width, _WORD) if words else width for width, words in zip(whole, columns.values(), strict=True)]
    needed = 1 + sum(_FRAME + width for width in least)
    if out.is_terminal and needed > out.width:
        out.print(title, style="italic")
        for row in rows:
            lines = [f"{name}: {text}" for name, text in zip(columns, row, strict=True) if text]
            out.print("\n".join(lines), "", sep="\n", soft_wrap=True)
        return
    table = Table(title=title or None)
    for i, (name, words) in enumerate(columns.items()):
        justify = "left" if words or i == 0 else "right"
        table.add_column(name, justify=justify, no_wrap=not words, overflow="fold", min_width=least[i])
    for n, row in enumerate(rows, 1):
        table.add_row(*row, end_section=bool(every) and n % every == 0)
    if not out.is_terminal:  # a log file has no width
        out = Console(file=out.file, width=max(needed, out.width), markup=False, emoji=False, highlight=False)
    out.print(table)


def print_choice(out: Console, choice: Choice, cost: ExitCost) -> None:
    """Print the chosen thresholds, their outcome on the validation data, their cost, and the promise."""
    outcome = choice.outcome
    each = cost.latency_us(choice.policy.enabled)
    rows = [
        (str(n), rule, f"{share:.1%}", "" if accuracy is None else f"{accuracy:.2%}", f"{us:.1f}")
        for n, (rule, share, accuracy, us) in enumerate(
            zip(choice.policy.rules(), outcome.exit_share, outcome.exit_accuracy, each, strict=True), 1
        )
    ]
    columns = {"exit": False, "leaves if": True, "share": False, "accuracy": False, "us": False}
    show(out, columns, rows, title="chosen on validation data")
    out.print(f"accuracy {outcome.accuracy:.2%}, last exit alone {outcome.last_accuracy:.2%}")
    if outcome.mean_us is not None:
        out.print(
            f"time per sample: mean {outcome.mean_us:.1f} us, 95th percentile {outcome.p95_us:.1f} us, worst "
            f"{outcome.worst_us:.1f} us",
            *speed_lines(choice, cost),
            sep="\n",
        )
    if choice.promise is not None:
        out.print(str(choice.promise))
    elif choice.constraint.keys() & set(PROMISED):
        out.print(f"no promise for unseen data: the limit holds for these {outcome.samples} samples only")


def speed_lines(choice: Choice, cost: ExitCost) -> list[str]:
    """The speed-up of a choice over the plain network with its timing error, and a warning about unsteady times."""
    if cost.plain_us is None or choice.outcome.mean_us is None:
        return []
    speed = cost.plain_us / choice.outcome.mean_us
    line = f"{speed:.2f}x the speed of the plain network, {cost.plain_us:.1f} us"
    if cost.spread is not None and any(choice.policy.enabled[:-1]):
        factor = 1 + sqrt(2) * cost.spread  # error of a ratio of two such times
        line += f"; between {speed / factor:.2f}x and {speed * factor:.2f}x within the timing error"
        if speed / factor <= 1 <= speed * factor:
            line += ": no clear difference"
    lines = [line]
    if cost.spread is not None and cost.spread > STEADY:
        lines.append(
            f"the times were not steady (error up to {cost.spread:.1%}) because of other work on this machine: "
            "measure again with --remeasure when it is idle"
        )
    return lines


def print_advice(out: Console, advice: Any, note: str = "") -> None:
    """Print the best design per number of exits, the advice, and a note."""
    numbers = dict.fromkeys(("us", "95%", "speed-up", "at best", "accuracy"), False)
    rows = []
    for design in advice.designs:
        low, high = design.interval_us
        exits = ", ".join(f"{branch} at {tap}" for tap, branch in zip(design.taps, design.branches, strict=True))
        rows.append((
            str(len(design.exit_share)), exits or "none", f"{design.us:.1f}", f"{low:.1f}-{high:.1f}",
            f"{advice.plain_us / design.us:.2f}x", f"{advice.plain_us / design.oracle_us:.2f}x",
            f"{design.accuracy:.2%}",
        ))  # fmt: skip
    show(out, {"exits": False, "early exits": True, **numbers}, rows, title="predicted")
    out.print(str(advice))
    if note:
        out.print(note, soft_wrap=True)


def print_bench(out: Console, rows: Sequence[Mapping[str, Any]], note: str = "") -> None:
    """Print plain, branchy and limit in three lines per row, and a note."""
    numbers = dict.fromkeys(("us", "speed-up", "accuracy", "leave at exit 1, 2, …"), False)
    columns = {"runtime": True, "network": True, **numbers}
    lines = []
    for row in rows:
        shares = ", ".join(f"{share:.1%}" for share in row["exit_share"])
        right = "" if row["plain_accuracy"] is None else f"{row['plain_accuracy']:.2%}"
        branchy = f"{row['accuracy_branchy']:.2%}"
        for first, name, us, accuracy, last in (
            (row["runtime"], "plain", row["plain_us"], right, ""),
            (f"batch {row['batch']}", row["network"], row["branchy_us"], branchy, shares),
            (counted(row["threads"], "thread"), "limit", row["limit_us"], branchy, f"overhead {row['overhead']:.2f}"),
        ):
            lines.append((first, name, f"{us:.1f}", f"{row['plain_us'] / us:.2f}x", accuracy, last))
    show(out, columns, lines, title="microseconds per sample, and test accuracy", every=3)
    if rows and all(threshold is None for threshold in rows[0]["thresholds"]):
        out.print("no sample leaves early with these thresholds: the file computes the plain network and its score")
    spread = max((row.get("spread") or 0.0 for row in rows), default=0.0)
    if spread > STEADY:
        out.print(
            f"the times were not steady (error of a speed-up up to {spread:.1%}) because of other work on this "
            "machine: time again when it is idle",
            soft_wrap=True,
        )
    if note:
        out.print(note, soft_wrap=True)


def print_answers(out: Console, answers: Sequence[Mapping[str, Any]]) -> None:
    """Print the predictions of `predict_files`, if there are any."""
    rows = [(a["image"], a["label"], str(a["exit"]), f"{a['score']:.4g}") for a in answers]
    if rows:
        show(out, {"image": True, "label": True, "exit": False, "score": False}, rows)


def print_model(out: Console, engine: Any) -> None:
    """Print the inputs, exits, thresholds and metadata of an exported file."""
    exits = f"{engine.num_exits}, flat: no sample leaves early"
    if engine.policy is not None:
        exits = "\n".join(f"{n}: {rule}" for n, rule in enumerate(engine.policy.rules(6, "never (left out)"), 1))
    rows = [("inputs", "\n".join(map(str, engine.inputs))), ("exits", exits)]
    for name in ("batch", "thresholds", "labels", "preprocessing", "promise", "version"):
        value = engine.metadata.get(name)
        if value not in (None, []):
            rows.append((name, printable(", ".join(value) if name == "labels" else str(value))))
    table = Table(show_header=False, box=None)
    for name, value in rows:
        table.add_row(name, value)
    out.print(table)


_CALLS = {"record": "train", "fit": "train", "measure": "choose", "advise": "design"}
_PHRASES = {
    "confidence=None": "--no-promise",
    "or None for no promise": "or --no-promise for none",
    "policy=None": "no thresholds",
    "train it longer": "train it longer, in a new run folder with a larger --warm-start-epochs",
}


def in_options(message: str, options: Mapping[str, str]) -> str:
    """Rewrite a message about Python arguments in terms of a command's options, such as max_drop as ``--max-drop``."""
    message = re.sub(r" \(in Python, [^()]*(\([^()]*\))?[^()]*\)", "", message)
    message = re.sub(r",? (\()?or FitOptions\(resume=False\)[\w ]*(?(1)\))", "", message)
    for python, phrase in _PHRASES.items():
        message = message.replace(python, phrase)
    message = re.sub(
        r"\b(attach|advise|bench|choose|export|fit|measure|record)\(\.\.\.\)",
        lambda found: f"`branchynet {_CALLS.get(found[1], found[1])}`",
        message,
    )
    for name, option in sorted(options.items(), key=lambda pair: -len(pair[0])):
        assigned = rf"(?<![\w./-]){name}=(?:'([^']*)'|([^\s,;:)]*))"
        message = re.sub(assigned, lambda m, o=option: f"{o} {m[1] or m[2] or ''}".rstrip(), message)
        message = re.sub(rf"^{name}(?= must\b)", option, message)
        if "_" in name:
            message = re.sub(rf"(?<![\w./-]){name}(?![\w./-])", option, message)
    return message
