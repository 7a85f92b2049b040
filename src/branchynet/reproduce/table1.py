"""Table I of the paper, ours beside theirs, with what theirs left out: overhead, limit, and other plain networks."""

from collections.abc import Sequence
from typing import Any

from .measured import Measured, Operating, Static
from .published import TABLE_1, Published

HEADER = (
    "| network | accuracy | us | gain | overhead | limit, us | M MACs | thresholds | leave at exit, % |\n"
    "|---|--:|--:|--:|--:|--:|--:|---|---|"
)


def rows(found: Measured) -> dict[str, Any]:
    """The rows of one network as data."""
    cost, plain = found.cost, found.plain
    published = TABLE_1[found.recipe.name]
    return {
        "plain": {
            "network": plain.name, "accuracy": plain.accuracy, "us": plain.us,
            "macs": float(cost.macs([False] * (cost.exits - 1) + [True])[-1]),
        },
        "branchy": [_point(point) for point in found.points],
        "smaller": [{"network": s.name, "accuracy": s.accuracy, "us": s.us} for s in found.smaller],
        "published": {**vars(published), "cpu_gain": published.cpu_gain},
    }  # fmt: skip


def _point(point: Operating) -> dict[str, Any]:
    outcome, row = point.outcome, point.bench
    return {
        "network": point.name,
        "accuracy": outcome.accuracy,
        "interval": list(outcome.accuracy_interval),
        "asked_on_validation": point.asked,
        "reached_on_validation": point.reached,
        "last_exit_accuracy": outcome.last_accuracy,
        "us": row["branchy_us"],
        "gain": row["speedup"],
        "overhead": row["overhead"],
        "limit_us": row["limit_us"],
        "macs": outcome.mean_macs,
        "thresholds": list(point.policy.thresholds),
        "exit_share": list(outcome.exit_share),
        "cuda": point.cuda,
    }


def table(tables: list[dict[str, Any]]) -> str:
    """The table as Markdown; a published row and the other plain networks below ours."""
    lines = [HEADER]
    for t in tables:
        plain, published = t["plain"], t["published"]
        lines.append(_line(plain["network"], plain["accuracy"], plain["us"], macs=plain["macs"]))
        for row in t["branchy"]:
            lines.append(
                _line(
                    f"**{row['network']}**", row["accuracy"], row["us"], f"**{row['gain']:.2f}x**",
                    f"{row['overhead']:.2f}", f"{row['limit_us']:.0f}", row["macs"], row["thresholds"],
                    row["exit_share"],
                )
            )  # fmt: skip
        lines.append(
            f"| *published* | {published['accuracy']:.2%}, plain {published['accuracy_plain']:.2%} | "
            f"| {published['cpu_gain']:.1f}x, trunk alone | | | | {_thresholds(published['thresholds'])} "
            f"| {_shares(published['exit_share'])} |"
        )
        for row in t["smaller"]:
            lines.append(_line(row["network"], row["accuracy"], row["us"], f"{plain['us'] / row['us']:.2f}x"))
    return "\n".join(lines)


def _line(
    name: str, accuracy: float, us: float, gain: str = "", overhead: str = "", limit: str = "",
    macs: float | None = None, thresholds: Sequence[float | None] = (), shares: Sequence[float] = (),
) -> str:  # fmt: skip
    cells = (
        name, f"{accuracy:.2%}", f"{us:.0f}", gain, overhead, limit, "" if macs is None else _millions(macs),
        _thresholds(thresholds), _shares(shares),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def dominated(found: Measured) -> Static | None:
    """The smaller plain network that is both as accurate as ours, at its first choice, and as fast, if there is one."""
    first = found.points[0]
    better = [s for s in found.smaller if s.accuracy >= first.outcome.accuracy and s.us <= first.bench["branchy_us"]]
    return min(better, key=lambda s: s.us, default=None)


def compared(found: Measured) -> str:
    """One line: ours beside the published number, and the smaller network that does better where one does."""
    first, theirs = found.points[0], TABLE_1[found.recipe.name]
    line = (
        f"{found.recipe.title}: {first.outcome.accuracy:.2%} at {first.bench['speedup']:.2f}x the plain network's "
        f"speed, everything timed; plain {found.plain.accuracy:.2%}. {_theirs(theirs)}"
    )
    rival = dominated(found)
    if rival:
        line += f" {rival.name} does better: {rival.accuracy:.2%} at {found.plain.us / rival.us:.2f}x."
    return line


def _theirs(published: Published) -> str:
    return (
        f"Published: {published.accuracy:.2%} at {published.cpu_gain:.1f}x, trunk timed only; plain "
        f"{published.accuracy_plain:.2%}."
    )


def _millions(macs: float) -> str:
    return f"{macs / 1e6:.2f}" if macs < 1e7 else f"{macs / 1e6:.0f}"


def _thresholds(thresholds: Sequence[float | None]) -> str:
    return ", ".join("never" if t is None else f"{t:.4g}" for t in thresholds)


def _shares(shares: Sequence[float]) -> str:
    return ", ".join(f"{100 * share:.1f}" for share in shares)
