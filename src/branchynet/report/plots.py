"""The report's figures, as matplotlib Figures that save as PNG, SVG or PDF.

Shape letters: S samples, N exits, P threshold vectors. `svg.inline` replaces the colors of the palette with those of
the page, light or dark, and turns group ids that begin with ``tip:`` into tooltips.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError

INK, MUTED, RULE, PAPER = "#1f2328", "#5c6670", "#dde2e7", "#ffffff"
RIGHT, WRONG, CHOSEN = "#0b62c4", "#c2410c", "#8a3ffc"

_STYLE: Any = {
    **{"font.size": 10.5, "axes.labelsize": 10.5, "grid.linewidth": 0.8, "axes.facecolor": "none"},
    **{"text.color": INK, "axes.labelcolor": INK, "figure.facecolor": PAPER, "grid.color": RULE},
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
}


def figure_tradeoff(
    mean_us: ArrayLike,
    accuracy: ArrayLike,
    *,
    plain: tuple[float, float] | None = None,
    chosen: tuple[float, float] | None = None,
    tested: tuple[float, float, float, float] | None = None,
    rivals: Mapping[str, tuple[float, float]] | None = None,
    sweep: tuple[ArrayLike, ArrayLike] | None = None,
    most: int = 300,
) -> Figure:
    """Plot accuracy against mean time per sample.

    Args:
        mean_us: `(P,)` microseconds per sample of each threshold vector, on validation data.
        accuracy: `(P,)` fractions.
        plain: microseconds and accuracy of the plain network, drawn as a diamond.
        chosen: microseconds and accuracy of the chosen thresholds on validation data, drawn as a star.
        tested: microseconds, accuracy and the two ends of its 95% interval of the chosen thresholds on test data,
            drawn as a ring with a bar.
        rivals: microseconds and accuracy of other plain networks by name, drawn as small diamonds.
        sweep: microseconds and accuracy of other threshold vectors, drawn as small dots.
        most: largest number of points of the curve.

    Raises:
        InputError: `mean_us` and `accuracy` have different lengths, or are empty.

    Source: Teerapittayanon et al. 2016, Figure 3.

    Example:
        >>> figure_tradeoff([10.0, 20.0], [0.95, 0.97], plain=(40.0, 0.97)).axes[0].get_ylabel()
        'accuracy (%)'
    """
    us, percent = np.asarray(mean_us, np.float64), 100 * np.asarray(accuracy, np.float64)
    if us.ndim != 1 or us.shape != percent.shape or not len(us):
        raise InputError(f"mean_us {us.shape} and accuracy {percent.shape} must have the same shape (P,), not empty")
    points = [point for point in (plain, chosen, tested, *(rivals or {}).values()) if point is not None]
    top = max(percent.max(), *(100 * point[1] for point in points), -math.inf)
    low = min(top - 2, *(100 * point[1] for point in points), math.inf)
    keep = np.argsort(us, kind="stable")
    keep = keep[percent[keep] >= min(percent.max(), 2 * low - top)]  # points far below would hide the knee
    keep = keep[np.unique(np.linspace(0, len(keep) - 1, min(len(keep), most)).round().astype(np.intp))]
    us, percent = us[keep], percent[keep]

    with matplotlib.rc_context(_STYLE):
        figure, axes = _new(7.4, 4.3)
        axes.plot(us, percent, color=RIGHT, lw=1.4, drawstyle="steps-post", alpha=0.6, zorder=2)
        dots = axes.scatter(us, percent, s=11, color=RIGHT, lw=0, zorder=3, label="best thresholds, validation data")
        dots.set_gid("tip:" + "|".join(f"{microseconds(u)}, {p:.2f}%" for u, p in zip(us, percent, strict=True)))
        marks = (
            (plain, "D", 62, MUTED, MUTED, "plain network"),
            (chosen, "*", 230, CHOSEN, CHOSEN, "chosen thresholds, validation data"),
            (tested, "o", 80, "none", CHOSEN, "chosen thresholds, test data (95%)"),
        )
        for point, marker, size, face, edge, label in marks:
            if point is not None:
                x, y = point[:2]
                spot = axes.scatter(x, 100 * y, marker=marker, s=size, color=face, edgecolors=edge, lw=1.8, zorder=5)
                spot.set_gid(f"tip:{label}: {microseconds(x)}, {y:.2%}")
                spot.set_label(label)
        if sweep is not None:
            swept_us, swept = np.asarray(sweep[0]), 100 * np.asarray(sweep[1])
            shown = swept >= percent.min()
            axes.scatter(swept_us[shown], swept[shown], s=7, color=MUTED, alpha=0.5, lw=0, zorder=1, label="sweep")
        for name, (x, y) in (rivals or {}).items():
            spot = axes.scatter(x, 100 * y, marker="D", s=26, color="none", edgecolors=MUTED, lw=1.3, zorder=4)
            spot.set_gid(f"tip:{name}: {microseconds(x)}, {y:.2%}")
            axes.annotate(name, (x, 100 * y), xytext=(6, -9), textcoords="offset points", fontsize=8, color=MUTED)
        if tested:
            axes.vlines(tested[0], 100 * tested[2], 100 * tested[3], color=CHOSEN, lw=1.6, alpha=0.5, zorder=4)
        if tested and plain and plain[0] > tested[0]:
            axes.annotate(
                f"←  {plain[0] / tested[0]:.1f}× faster", ((tested[0] + plain[0]) / 2, 100 * tested[1]),
                xytext=(0, -16), textcoords="offset points", ha="center", color=CHOSEN, weight="bold", zorder=6,
            )  # fmt: skip
        axes.set_xlabel("mean time per sample (µs)")
        axes.set_ylabel("accuracy (%)")
        axes.set_xlim(left=0)
        figure.legend(loc="outside upper left", ncols=2, handletextpad=0.4)
    return figure


def figure_candidates(
    tried: Sequence[Any], chosen: Sequence[tuple[str, str]] = (), plain: tuple[float, float] | None = None
) -> Figure:
    """Plot the accuracy of each candidate (a `branchynet.design.advice.CandidateResult`) against the time up to it.

    Lines join the candidates at one tap. Rings mark the exits of the design, given as `chosen` taps and branches, and a
    diamond the microseconds and accuracy of the plain network. Raises `InputError` if there are no candidates.
    """
    if not tried:
        raise InputError("no candidates to draw; give those of an Advice")
    taps = list(dict.fromkeys(spot.tap for spot in tried))
    with matplotlib.rc_context(_STYLE):
        figure, axes = _new(7.4, 4.6)
        for n, tap in enumerate(taps):
            here = sorted((spot for spot in tried if spot.tap == tap), key=lambda spot: spot.us)
            us, percent = [spot.us for spot in here], [100 * spot.accuracy for spot in here]
            axes.plot(us, percent, color=RIGHT, lw=0.8, alpha=0.35, zorder=2)
            dots = axes.scatter(us, percent, s=22, color=RIGHT, alpha=0.35 + 0.65 * (n + 1) / len(taps), lw=0, zorder=3)
            tips = (f"{spot.branch} at {tap}: {microseconds(spot.us)}, {spot.accuracy:.2%}" for spot in here)
            dots.set_gid("tip:" + "|".join(tips))
            top = max(zip(us, percent, strict=True), key=lambda point: point[1])
            axes.annotate(tap, top, xytext=(5, 4), textcoords="offset points", fontsize=8, color=INK)
        rings = [spot for spot in tried if (spot.tap, spot.branch) in chosen]
        if rings:
            axes.scatter(
                [s.us for s in rings], [100 * s.accuracy for s in rings], s=130, color="none", edgecolors=CHOSEN, lw=2,
                zorder=5, label="exits of the design",
            )  # fmt: skip
        if plain is not None:
            axes.scatter(plain[0], 100 * plain[1], marker="D", s=62, color=MUTED, label="plain network", zorder=4)
        axes.set_xlabel("time up to the exit (µs per sample)")
        axes.set_ylabel("accuracy of the exit alone (%)")
        axes.set_xlim(left=0)
        if rings or plain is not None:
            axes.legend(loc="lower right", handletextpad=0.4)
    return figure


def figure_shares(share: Sequence[float], accuracy: Sequence[float | None]) -> Figure:
    """Plot the share of samples that leave at each exit, and their accuracy.

    Args:
        share: `(N,)` shares, summing to 1.
        accuracy: `(N,)` accuracy of the samples that leave at each exit; None if there are none.

    Raises:
        InputError: the lengths differ.
    """
    if len(share) != len(accuracy) or not len(share):
        raise InputError(f"{len(share)} shares and {len(accuracy)} accuracies; there must be one of each per exit")
    with matplotlib.rc_context(_STYLE):
        figure, axes = _new(7.4, 0.5 + 0.5 * len(share))
        for n, (part, right) in enumerate(zip(share, accuracy, strict=True), 1):
            text = f"{part:.1%}" + (f", accuracy {right:.2%}" if right is not None else "")
            known = right or 0.0
            for left, width, color in ((0, part * known, RIGHT), (part * known, part * (1 - known), WRONG)):
                bar = axes.barh(n, 100 * width, left=100 * left, height=0.62, color=color)[0]
                bar.set_gid(f"tip:exit {n}: {text}")
            axes.text(100 * part + 1, n, text, va="center")
        axes.set_yticks(range(1, len(share) + 1), [f"exit {n}" for n in range(1, len(share) + 1)], color=INK)
        axes.set_xlim(0, 135)  # leaves room for the text next to a full bar
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.tick_params(axis="y", length=0)
        figure.legend(handles=_verdicts(), loc="outside upper right", ncols=2)
    return figure


def figure_leaving(share: ArrayLike, accuracy: ArrayLike, largest: ArrayLike, *, knee: int | None = None) -> Figure:
    """Plot accuracy and largest entropy against the share of samples that leave at the first exit.

    Args:
        share: `(P,)` increasing fractions.
        accuracy: `(P,)` fractions.
        largest: `(P,)` largest entropy of the samples that leave, in nats.
        knee: index of the point to mark.

    Raises:
        InputError: the arrays have different shapes, or are empty.

    Source: Teerapittayanon et al. 2016, Figure 4.
    """
    x, y, top = (np.asarray(values, np.float64) for values in (share, accuracy, largest))
    if x.ndim != 1 or not x.shape == y.shape == top.shape or not len(x):
        raise InputError(
            f"share {x.shape}, accuracy {y.shape} and largest {top.shape} must have the same shape (P,), not empty"
        )
    with matplotlib.rc_context(_STYLE):
        figure, (above, below) = _new(7.4, 4.6, rows=2, sharey=False)
        for axes, values, label in ((above, 100 * y, "accuracy (%)"), (below, top, "largest entropy (nats)")):
            axes.plot(100 * x, values, color=RIGHT, lw=1.6)
            axes.set_ylabel(label)
            if knee is not None:
                spot = axes.scatter(100 * x[knee], values[knee], marker="*", s=180, color=CHOSEN, zorder=5)
                spot.set_gid(f"tip:the knee of the entropy: {x[knee]:.1%} leave, {values[knee]:.4g}")
        below.set_xlabel("samples that leave at exit 1 (%)")
    return figure


def figure_scores(
    scores: ArrayLike,
    losses: ArrayLike,
    thresholds: Sequence[float | None] = (),
    *,
    name: str = "entropy (nats)",
    bins: int = 40,
) -> Figure:
    """Plot histograms of the scores at each exit for right and wrong predictions, with the thresholds.

    Args:
        scores: `(S, N)`; a smaller score means more confidence. NaN and infinity are left out.
        losses: `(S, N)`; predictions with a loss below one half are right.
        thresholds: N-1 thresholds, None for never; or an empty sequence.
        name: name and unit of the score.
        bins: number of bins per histogram.

    Raises:
        InputError: the shapes differ.
    """
    values, wrong = np.asarray(scores, np.float64), np.asarray(losses) >= 0.5
    if values.ndim != 2 or values.shape != wrong.shape:
        raise InputError(f"scores {values.shape} and losses {wrong.shape} must have the same shape (S, N)")
    exits = values.shape[1]
    columns = min(exits, 3)
    rows = math.ceil(exits / columns)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    limits = [*thresholds, *[None] * (exits - len(thresholds))]
    with matplotlib.rc_context(_STYLE):
        figure, panels = _new(7.4, 0.6 + 2.3 * rows, rows, columns)
        most = 1
        for axes in np.ravel(panels)[exits:]:
            axes.set_visible(False)
        for n, (axes, limit) in enumerate(zip(np.ravel(panels), limits, strict=False)):
            most = max(most, _histogram(axes, values[:, n], wrong[:, n], edges))
            if limit is not None and edges[0] <= limit <= edges[-1]:
                line = axes.axvline(limit, color=CHOSEN, lw=1.6, ls=(0, (4, 2)))
                line.set_gid(f"tip:exit {n + 1}: threshold {limit:.4g}")
            axes.set_title(f"exit {n + 1}", fontsize=10.5, loc="left")
            axes.set_xlim(edges[0], edges[-1])
            axes.set_ylim(0.7, 1.6 * most)
        figure.supxlabel(name, fontsize=10.5, parse_math=False)
        figure.supylabel("samples", fontsize=10.5)
        handles = _verdicts()
        if any(limit is not None for limit in limits):
            handles.append(Line2D([], [], color=CHOSEN, lw=1.6, ls=(0, (4, 2)), label="threshold"))
        figure.legend(handles=handles, loc="outside upper right", ncols=3)
    return figure


def _histogram(axes: Axes, values: NDArray[np.float64], wrong: NDArray[np.bool_], edges: NDArray[np.float64]) -> int:
    """Draw both histograms, and return the largest count. They are not stacked because the axis is logarithmic."""
    finite = np.isfinite(values)
    right, wrong = (np.histogram(values[finite & those], edges)[0] for those in (~wrong, wrong))
    for counts, color in ((right, RIGHT), (wrong, WRONG)):
        axes.stairs(counts, edges, fill=True, color=color, alpha=0.22, lw=0)
        axes.stairs(counts, edges, color=color, lw=1.3, baseline=None)
    # Invisible bars for the tooltips.
    hover = axes.bar(edges[:-1], np.maximum(right, wrong), np.diff(edges), align="edge", color=RIGHT, alpha=0)
    for bar, yes, no, start, stop in zip(hover, right, wrong, edges[:-1], edges[1:], strict=True):
        bar.set_gid(f"tip:{yes} right, {no} wrong at {start:.3g} to {stop:.3g}")
    axes.set_ylim(0.7, 1.6)  # before the scale, which warns if a panel has no samples
    axes.set_yscale("log")
    axes.grid(visible=False, axis="x")
    return max(right.max(), wrong.max())


def _verdicts() -> list[Artist]:
    return [Patch(color=RIGHT, label="right"), Patch(color=WRONG, label="wrong")]


def _new(width: float, height: float, rows: int = 1, columns: int = 1, sharey: bool = True) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.subplots(rows, columns, sharex=True, sharey=sharey)


def microseconds(us: float) -> str:
    """Format a time, such as 41.2 µs."""
    return f"{us / 1000:.4g} ms" if us >= 10_000 else f"{us:.4g} µs"
