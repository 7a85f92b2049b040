"""Table I of the paper: our results and the paper's, with overhead, limit and smaller plain networks."""

from collections.abc import Sequence
from typing import Any

from ..policy.evaluation import first_correct
from ..policy.values import thresholds_text
from .paper import TABLE_1
from .results import NetworkResult, OperatingPoint

HEADER = (
    "| network | accuracy | us | gain | overhead | limit, us | M MACs | thresholds | leave at exit, % |\n"
    "|---|--:|--:|--:|--:|--:|--:|---|---|"
)


def rows(found: NetworkResult) -> dict[str, Any]:
    """The rows of one network as data; ``oracle_gain``: if each image left at the first exit that is right."""
    cost, reported = found.cost, TABLE_1[found.recipe.name]
    each = cost.latency_us([True] * cost.num_exits)
    macs = cost.macs([False] * (cost.num_exits - 1) + [True])
    return {
        "name": found.recipe.name,
        "plain": {**vars(found.plain), "macs": float(macs[-1])},
        "branchy": [_point(point) for point in found.points],
        "exit_accuracy": [float(a) for a in 1 - found.test.losses.mean(axis=0)],
        "oracle_gain": float(cost.plain_us / each[first_correct(found.test.losses)].mean()),
        "smaller": [vars(plain) for plain in found.smaller],
        "published": {**vars(reported), "cpu_gain": reported.cpu_ms_plain / reported.cpu_ms},
    }


def _point(point: OperatingPoint) -> dict[str, Any]:
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
        "limit_in_order_us": row["limit_in_order_us"],
        "overhead_sorted": row["overhead_sorted"],
        "macs": outcome.mean_macs,
        "thresholds": list(point.policy.thresholds),
        "exit_share": list(outcome.exit_share),
        "cuda": point.cuda,
    }


def table(tables: list[dict[str, Any]]) -> str:
    """The table as Markdown: our rows, then the paper's row and the smaller plain networks."""
    lines = [HEADER]
    for t in tables:
        plain, theirs = t["plain"], t["published"]
        lines.append(_line(plain["network"], plain["accuracy"], plain["us"], macs=plain["macs"]))
        for row in t["branchy"]:
            more = 100 * (row["asked_on_validation"] - t["branchy"][0]["asked_on_validation"])
            asked = f", {more:+.1f} points asked" if abs(more) > 1e-6 else ""
            lines.append(
                _line(
                    f"**{row['network']}**{asked}", row["accuracy"], row["us"], f"**{row['gain']:.2f}x**",
                    f"{row['overhead']:.2f}", f"{row['limit_us']:.0f}", row["macs"],
                    (row["thresholds"], row["exit_share"]),
                )
            )  # fmt: skip
            if cuda := row["cuda"]:
                name = f"{row['network']}, GPU; plain {1e3 * cuda['plain_ms']:.0f} us"
                lines.append(_line(name, row["accuracy"], 1e3 * cuda["branchy_ms"], f"**{cuda['gain']:.2f}x**"))
        lines.append(
            f"| *reported in the paper* | {theirs['accuracy']:.2%}, plain {theirs['plain_accuracy']:.2%} | "
            f"| {theirs['cpu_gain']:.1f}x, trunk alone | | | | {thresholds_text(theirs['thresholds'])} "
            f"| {_shares(theirs['exit_share'])} |"
        )
        for row in t["smaller"]:
            lines.append(_line(row["network"], row["accuracy"], row["us"], f"{plain['us'] / row['us']:.2f}x"))
    return "\n".join(lines)


def _line(
    name: str, accuracy: float, us: float, gain: str = "", overhead: str = "", limit: str = "",
    macs: float | None = None, rule: tuple[Sequence[float | None], Sequence[float]] = ((), ()),
) -> str:  # fmt: skip
    millions = "" if macs is None else f"{macs / 1e6:.{2 if macs < 1e7 else 0}f}"
    rule_cells = (thresholds_text(rule[0]), _shares(rule[1]))
    return f"| {' | '.join((name, f'{accuracy:.2%}', f'{us:.0f}', gain, overhead, limit, millions, *rule_cells))} |"


def dominated(row: dict[str, Any]) -> dict[str, Any] | None:
    """The fastest smaller plain network that is as accurate and as fast as our first row; None if there is none."""
    first = row["branchy"][0]
    better = [s for s in row["smaller"] if s["accuracy"] >= first["accuracy"] and s["us"] <= first["us"]]
    return min(better, key=lambda s: float(s["us"]), default=None)


def compared(row: dict[str, Any]) -> str:
    """One line that compares our first row with the paper's, and with a smaller network that is better."""
    first, plain, theirs = row["branchy"][0], row["plain"], row["published"]
    line = (
        f"{first['network']}: {first['accuracy']:.2%} at {first['gain']:.2f}x the plain network's speed (every "
        f"operation timed); plain {plain['accuracy']:.2%}. The paper reports {theirs['accuracy']:.2%} at "
        f"{theirs['cpu_gain']:.1f}x (only the trunk timed); plain {theirs['plain_accuracy']:.2%}."
    )
    rival = dominated(row)
    if rival:
        line += f" {rival['network']} is better: {rival['accuracy']:.2%} at {plain['us'] / rival['us']:.2f}x."
    return line


def _shares(shares: Sequence[float]) -> str:
    return ", ".join(f"{100 * share:.1f}" for share in shares)
