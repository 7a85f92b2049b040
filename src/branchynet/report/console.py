"""Tables for the terminal, whose numbers stay whole however narrow it is, and errors in the command line's words."""

import re
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from ..errors import counted, printable
from ..policy.values import PROMISED, STEADY, Choice, ExitCost

_FRAME = 3  # characters that a column takes beside its content: a line and two spaces
_NEVER = "never (left out)"
_WORD = 16  # characters that a column of words is not narrowed below


def show(
    out: Console, columns: Mapping[str, bool], rows: Sequence[Sequence[str]], *, title: str = "", every: int = 0
) -> None:
    """Print a table; where the terminal is too narrow for it, every row as lines of ``name: value``.

    Args:
        out: where to; a log file has no width, and gets the table as wide as it is.
        columns: names, and whether words stand there, which may be folded. Numbers are not.
        rows: a text a column.
        title: above the table.
        every: a line after so many rows; 0 for none.
    """
    rows = [tuple(printable(text) for text in row) for row in rows]
    needed = 1
    for i, (name, words) in enumerate(columns.items()):
        whole = max(cell_len(text) for text in (name, *(row[i] for row in rows)))
        needed += _FRAME + (min(whole, _WORD) if words else whole)
    if out.is_terminal and needed > out.width:
        out.print(title, style="italic")
        for row in rows:
            told = [f"{name}: {text}" for name, text in zip(columns, row, strict=True) if text]
            out.print("\n".join(told), "", sep="\n", soft_wrap=True)
        return
    table = Table(title=title or None)
    for i, (name, words) in enumerate(columns.items()):
        least = min(_WORD, max(cell_len(text) for text in (name, *(row[i] for row in rows)))) if words else None
        table.add_column(
            name, justify="left" if words or i == 0 else "right", no_wrap=not words, overflow="fold", min_width=least
        )
    for n, row in enumerate(rows, 1):
        table.add_row(*row, end_section=bool(every) and n % every == 0)
    if not out.is_terminal:  # a log file has no width
        out = Console(file=out.file, width=max(needed, out.width), markup=False, emoji=False, highlight=False)
    out.print(table)


def print_choice(out: Console, choice: Choice, cost: ExitCost) -> None:
    """The chosen thresholds, what they do on the validation data and cost, and what is promised of other data."""
    outcome = choice.outcome
    each = cost.latency_us(choice.policy.enabled)
    rows = [
        (str(n), rule, f"{share:.1%}", "" if accuracy is None else f"{accuracy:.2%}", f"{us:.1f}")
        for n, (rule, share, accuracy, us) in enumerate(
            zip(choice.policy.rules(), outcome.exit_share, outcome.exit_accuracy, each, strict=True), 1
        )
    ]
    columns = {"exit": False, "leaves when": True, "share": False, "accuracy there": False, "us": False}
    show(out, columns, rows, title="chosen on validation")
    out.print(f"accuracy {outcome.accuracy:.2%}, last exit alone {outcome.last_accuracy:.2%}")
    if outcome.mean_us is not None:
        out.print(
            f"a sample costs {outcome.mean_us:.1f} us in the mean, {outcome.p95_us:.1f} us at the 95th percentile, "
            f"{outcome.worst_us:.1f} us at worst"
        )
        for line in speed_told(choice, cost):
            out.print(line)
    if choice.promise is not None:
        out.print(str(choice.promise))
    elif choice.constraint.keys() & set(PROMISED):
        out.print(f"no promise for other data: chosen on {outcome.samples} samples as they are")


def speed_told(choice: Choice, cost: ExitCost) -> list[str]:
    """How fast a choice is beside the network without exits, as far as the clock can tell."""
    if cost.plain_us is None or choice.outcome.mean_us is None:
        return []
    speed, plain = cost.plain_us / choice.outcome.mean_us, f"the network without exits, {cost.plain_us:.1f} us"
    told = f"{speed:.2f}x the speed of {plain}"
    if cost.spread is not None and any(choice.policy.enabled[:-1]):
        factor = 1 + sqrt(2) * cost.spread  # of a ratio of two such times
        told += f"; between {speed / factor:.2f}x and {speed * factor:.2f}x, as far as the clock can tell"
        if speed / factor <= 1 <= speed * factor:
            told += ": no clear difference"
    lines = [told]
    if cost.spread is not None and cost.spread > STEADY:
        lines.append(
            f"the times were not steady (off by up to {cost.spread:.1%}), as other work keeps this machine busy: "
            "measure again with --remeasure when it is quiet"
        )
    return lines


def print_advice(out: Console, advice: Any, note: str = "") -> None:
    """The best design of each number of exits, what is advised, and a note below."""
    columns = {
        "exits": False, "early exits": True, "us": False, "95 %": False, "speed-up": False, "at best": False,
        "accuracy": False,
    }  # fmt: skip
    rows = []
    for design in advice.designs:
        low, high = design.interval_us
        exits = ", ".join(f"{branch} at {tap}" for tap, branch in zip(design.taps, design.branches, strict=True))
        rows.append((
            str(len(design.exit_share)), exits or "none", f"{design.us:.1f}", f"{low:.1f}-{high:.1f}",
            f"{advice.plain_us / design.us:.2f}x", f"{advice.plain_us / design.oracle_us:.2f}x",
            f"{design.accuracy:.2%}",
        ))  # fmt: skip
    show(out, columns, rows, title="predicted")
    out.print(str(advice))
    if note:
        out.print(note, soft_wrap=True)


def print_bench(out: Console, rows: Sequence[Mapping[str, Any]], note: str = "") -> None:
    """Plain, branchy and limit, one below the other, for each batch size; a note on the plain network below."""
    columns = {
        "engine": True, "network": True, "us": False, "speed-up": False, "accuracy": False,
        "leave at exit 1, 2, …": False,
    }  # fmt: skip
    lines = []
    for row in rows:
        shares = ", ".join(f"{share:.1%}" for share in row["exit_share"])
        threads = f"{counted(row['threads'], 'thread')}"
        right = "" if row["plain_accuracy"] is None else f"{row['plain_accuracy']:.2%}"
        branchy = f"{row['accuracy_branchy']:.2%}"
        for where, name, us, accuracy, told in (
            (row["engine"], "plain", row["plain_us"], right, ""),
            (f"batch {row['batch']}", row["network"], row["branchy_us"], branchy, shares),
            (threads, "limit", row["limit_us"], branchy, f"overhead {row['overhead']:.2f}"),
        ):
            lines.append((where, name, f"{us:.1f}", f"{row['plain_us'] / us:.2f}x", accuracy, told))
    show(out, columns, lines, title="microseconds a sample, everything timed; accuracy on test images", every=3)
    if rows and all(threshold is None for threshold in rows[0]["thresholds"]):
        out.print("no sample leaves early with these thresholds: the file does the plain network's work, and its score")
    spread = max((row.get("spread") or 0.0 for row in rows), default=0.0)
    if spread > STEADY:
        out.print(
            f"the times were not steady (a speed-up is off by up to {spread:.1%}), as other work keeps this machine "
            "busy: time again when it is quiet",
            soft_wrap=True,
        )
    if note:
        out.print(note, soft_wrap=True)


def print_answers(out: Console, answers: Sequence[Mapping[str, Any]]) -> None:
    """What `predict_files` answers of each image; nothing where there is none."""
    rows = [(a["image"], a["label"], str(a["exit"]), f"{a['score']:.4g}") for a in answers]
    if rows:
        show(out, {"image": True, "label": True, "exit": False, "score": False}, rows)


def print_model(out: Console, engine: Any) -> None:
    """What an exported file holds: inputs, exits, thresholds, labels, preprocessing."""
    rows = [("inputs", "\n".join(str(i) for i in engine.inputs))]
    if engine.policy is None:
        rows.append(("exits", f"{engine.num_exits}, flat: none leaves early"))
    else:
        rows.append(("exits", "\n".join(f"{n}: {rule}" for n, rule in enumerate(engine.policy.rules(6, _NEVER), 1))))
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
    ", or FitOptions(resume=False) to start it anew": "",
    " (or FitOptions(resume=False))": "",
    "policy=None": "no thresholds",
}


def in_options(message: str, options: Mapping[str, str]) -> str:
    """A message that speaks of Python arguments, in terms of a command's options.

    Args:
        message: such as "max_drop=2 is out of range".
        options: the option of each parameter, such as ``--max-drop`` of ``max_drop``.
    """
    message = re.sub(r" \(in Python, [^()]*(\([^()]*\))?[^()]*\)", "", message)
    for python, told in _PHRASES.items():
        message = message.replace(python, told)
    message = re.sub(
        r"\b(attach|advise|bench|choose|export|fit|measure|record)\(\.\.\.\)",
        lambda found: f"`branchynet {_CALLS.get(found[1], found[1])}`",
        message,
    )
    for name, option in sorted(options.items(), key=lambda pair: -len(pair[0])):
        assigned = rf"(?<![\w./-]){name}=(?:'([^']*)'|([^\s,;:)]*))"
        message = re.sub(assigned, lambda m, o=option: f"{o} {m[1] or m[2] or ''}".rstrip(), message)
        if "_" in name:
            message = re.sub(rf"(?<![\w./-]){name}(?![\w./-])", option, message)
    return message
