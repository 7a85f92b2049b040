"""The report of a run: one HTML file that works offline and loads nothing from other machines."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, counted
from ..files import replacing
from ..policy.evaluation import Frontier
from ..policy.exit_cost import ExitCost
from ..policy.exit_record import ExitRecord
from ..policy.values import Choice, Outcome, score_name, thresholds_text
from .gallery import Gallery, gallery_section
from .plots import figure_candidates, figure_scores, figure_shares, figure_tradeoff, microseconds
from .svg import inline

_UNITS = {"entropy": "entropy (nats)", "max_probability": "1 − largest probability", "margin": "1 − margin"}


@dataclass(frozen=True, eq=False)
class RunReport:
    """The contents of a report.

    Attributes:
        title: names the network and the data.
        choice: the thresholds chosen on validation data.
        outcome: the outcome of ``choice.policy`` on the test data.
        record: the record of the test data, S samples of N exits.
        scores: `(S, N)` scores of `record` by the policy's score.
        curve: the result of `branchynet.frontier` on the validation data.
        cost: the cost of each stage.
        plain: microseconds per sample and accuracy of the plain network. By default they come from the row of `bench`
            that was timed like `cost`, and the time from `cost` if it has one.
        bench: rows of `branchynet.bench`.
        galleries: images to show.
        candidates: the results of the candidates that `advise` tried, as in `figure_candidates`.
        taken: tap and branch of the candidates that the design uses.
        facts: machine, versions, seed, data: what is needed to reproduce the run.
    """

    title: str
    choice: Choice
    outcome: Outcome
    record: ExitRecord
    scores: NDArray[Any]
    curve: Frontier | None = None
    cost: ExitCost | None = None
    plain: tuple[float, float] | None = None
    bench: Sequence[Mapping[str, Any]] = ()
    galleries: Sequence[Gallery] = ()
    candidates: Sequence[Any] = ()
    taken: Sequence[tuple[str, str]] = ()
    facts: Mapping[str, Any] | None = None


def write_report(
    path: str | os.PathLike[str], report: RunReport, *, picture: str | os.PathLike[str] | None = None
) -> None:
    """Write one HTML file below 3 MB with the curve, the exits, the scores, the timings and the images of a run.

    Args:
        path: the HTML file; its folder is created.
        report: the contents.
        picture: also write the curve to this PNG file.

    Raises:
        InputError: the values have different numbers of exits or samples.
        FileError: the file cannot be written.
    """
    choice, outcome, record, cost, bench = report.choice, report.outcome, report.record, report.cost, report.bench
    scores, plain = np.asarray(report.scores), report.plain
    _check(report, scores)
    timed = None if cost is None else (cost.batch_size, cost.threads)
    matching = next((row for row in bench if (row["batch"], row["threads"]) == timed), None)
    if plain is None and matching is not None and matching["plain_accuracy"] is not None:
        # Prefer the time measured together with the curve: the machine may have been faster or slower at other times.
        plain_us = matching["plain_us"] if cost is None or cost.plain_us is None else cost.plain_us
        plain = float(plain_us), float(matching["plain_accuracy"])
    sections = [
        _head(report.title, choice, outcome, record, matching or next(iter(bench), None)),
        _tradeoff(report, plain, picture),
        _candidates(report.candidates, report.taken, plain),
        _exits(choice, outcome, cost),
        _scores(choice, record, scores),
        _bench(bench),
        *(gallery_section(gallery) for gallery in report.galleries),
        _facts(choice, record, report.facts or {}),
    ]
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n'
        f"<title>{escape(report.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")  # names of files may hold any byte


def _check(report: RunReport, scores: NDArray[Any]) -> None:
    outcome, record = report.outcome, report.record
    exits = {
        "the policy": report.choice.policy.num_exits,
        "the outcome": len(outcome.exit_share),
        "the record": record.num_exits,
        "the cost": record.num_exits if report.cost is None else report.cost.num_exits,
    }
    if len(set(exits.values())) > 1:
        raise InputError(
            "all must be for one network, but " + ", ".join(f"{k} has {n} exits" for k, n in exits.items())
        )
    if scores.shape != record.losses.shape or outcome.samples != record.samples:
        raise InputError(
            f"scores of shape {scores.shape} and an outcome of {outcome.samples} samples do not match this record, "
            f"which has {record.samples} samples of {record.num_exits} exits"
        )
    for row in report.bench:
        if missing := BENCH_COLUMNS.keys() - row.keys():
            raise InputError(f"a row of bench lacks {sorted(missing)}; give rows as bench(...) returns them")


def _head(title: str, choice: Choice, outcome: Outcome, record: ExitRecord, timed: Mapping[str, Any] | None) -> str:
    low, high = outcome.accuracy_interval
    gain = f"{100 * (outcome.accuracy - outcome.last_accuracy):+.2f} points with early exits".replace("-", "−")
    cards = [
        ("Accuracy on test data", _percent(outcome.accuracy), f"95% interval {_percent(low)} to {_percent(high)}"),
        ("Last exit alone", _percent(outcome.last_accuracy), gain),
        ("Leave early", _percent(1 - outcome.exit_share[-1], 1), f"of {outcome.samples:,} test samples"),
    ]
    if outcome.mean_us is not None and outcome.p95_us is not None and outcome.worst_us is not None:
        most = f"95% within {microseconds(outcome.p95_us)}, worst {microseconds(outcome.worst_us)}"
        cards.append(("Mean time per sample", microseconds(outcome.mean_us), most))
    if timed is not None:
        times = f"{microseconds(timed['plain_us'])} plain, {microseconds(timed['branchy_us'])} with early exits"
        cards.append((f"Speed-up at batch {timed['batch']}", f"{timed['speedup']:.2f}×", f"measured: {times}"))
    limit = " and ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in choice.constraint.items())
    warning = (
        '<p class="warning" role="note">The thresholds were chosen on the data that this page reports, so all figures '
        "are optimistic.</p>"
    ) * (choice.record_digest == record.digest)
    notes = filter(None, (choice.promise, choice.reason))
    grounds = "".join(f'<p class="lead">{escape(str(note))}</p>\n' for note in notes)
    shown = "".join(
        f'<div><dt>{escape(name)}</dt><dd class="value">{value}</dd><dd class="note">{note}</dd></div>'
        for name, value, note in cards
    )
    return (
        f'<header>\n<h1>{escape(title)}</h1>\n<p class="lead">Each sample leaves at the first exit that is confident '
        f"enough. The thresholds were chosen on {choice.outcome.samples:,} validation samples under "
        f"<strong>{escape(limit)}</strong>; this page shows results for {outcome.samples:,} test samples.</p>\n"
        f"{grounds}{warning}"
        f'<dl class="cards">{shown}</dl>\n</header>'
    )


def _tradeoff(report: RunReport, plain: tuple[float, float] | None, picture: str | os.PathLike[str] | None) -> str:
    curve, before, after = report.curve, report.choice.outcome, report.outcome
    if curve is None:
        return ""
    figure = figure_tradeoff(
        curve.mean_us,
        curve.accuracy,
        plain=plain,
        chosen=None if before.mean_us is None else (before.mean_us, before.accuracy),
        tested=None if after.mean_us is None else (after.mean_us, after.accuracy, *after.accuracy_interval),
    )
    if picture is not None:
        with replacing(picture) as temporary:
            figure.savefig(temporary, format="png")
    return _figure(
        "tradeoff",
        "Accuracy against time",
        figure,
        f"Accuracy against mean time per sample for {len(curve.accuracy)} threshold settings; the chosen one reaches "
        f"{_percent(after.accuracy)} on test data.",
        "Each dot is a choice of thresholds. No other choice is both faster and more accurate on the validation data, "
        "at the measured costs. Choices far below the chosen accuracy are left out. The bar is the 95% interval of "
        "the test accuracy.",
    )


def _candidates(tried: Sequence[Any], taken: Sequence[tuple[str, str]], plain: tuple[float, float] | None) -> str:
    if not tried:
        return ""
    return _figure(
        "candidates",
        "Candidate exits",
        figure_candidates(tried, taken, plain),
        f"Accuracy against time of {len(tried)} candidate exits; exits of the design: "
        + (", then ".join(f"{branch} at {tap}" for tap, branch in taken) or "none")
        + ".",
        "Each dot is one branch at one tap, trained on the frozen network and evaluated on validation data. Lines join "
        "the branches at one tap. The exits are chosen as a set, which need not contain the best single exit.",
    )


def _exits(choice: Choice, outcome: Outcome, cost: ExitCost | None) -> str:
    rows = []
    for n, (rule, share, right) in enumerate(
        zip(choice.policy.rules(never="never (left out)"), outcome.exit_share, outcome.exit_accuracy, strict=True)
    ):
        row = [str(n + 1), rule, _percent(share, 1), "" if right is None else _percent(right)]
        if cost is not None:
            row += [f"{cost.trunk_us[n]:.4g}", f"{cost.branch_us[n]:.4g}"]
            row += [f"{cost.trunk_macs[n]:,.0f}", f"{cost.branch_macs[n]:,.0f}"]
        rows.append(row)
    head = ["exit", "leaves if", "share", "accuracy"]
    caption = "Exits on test data"
    if cost is not None:
        head += ["trunk µs", "branch µs", "trunk MACs", "branch MACs"]
        caption += f"; costs per sample of the stages at batch {cost.batch_size}, {counted(cost.threads, 'thread')}"
    shares = "; ".join(f"exit {row[0]}: {row[2]} of the samples" for row in rows)
    figure = figure_shares(outcome.exit_share, outcome.exit_accuracy)
    return _figure("shares", "Samples per exit", figure, f"Shares of the test samples. {shares}.", "") + _table(
        caption, head, rows, words=(1,)
    )


def _scores(choice: Choice, record: ExitRecord, scores: NDArray[Any]) -> str:
    name = score_name(choice.policy.score)
    figure = figure_scores(scores, record.losses, choice.policy.thresholds, name=_UNITS.get(name, name))
    return _figure(
        "scores",
        "Confidence of each exit",
        figure,
        f"Histograms of the {name} at each of {record.num_exits} exits, for right and wrong predictions.",
        "Each histogram shows all test samples, including those that leave earlier. A smaller score means more "
        "confidence. At a good exit, wrong predictions are to the right of the threshold. The vertical axis is "
        "logarithmic.",
    )


def _bench(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    body = [["" if row[key] is None else show(row[key]) for key, (_, show) in BENCH_COLUMNS.items()] for row in rows]
    head = [title for title, _ in BENCH_COLUMNS.values()]
    table = _table("Microseconds per sample; every operation is timed", head, body, words=(1,))
    return (
        '<section class="dense" aria-labelledby="bench">\n<h2 id="bench">Measured speed</h2>\n<p class="quiet">'
        "Limit: the time of separate graphs that end at each exit, weighted by the share that leaves there. "
        f"Overhead: branchy ÷ limit. Speed-up: plain ÷ branchy.</p>\n{table}\n</section>"
    )


def _facts(choice: Choice, record: ExitRecord, facts: Mapping[str, Any]) -> str:
    rows = {
        **facts,
        "chosen on": f"record {choice.record_digest[:12]}, {choice.outcome.samples:,} samples",
        "reported on": f"record {record.digest[:12]}, {record.samples:,} samples",
    }
    items = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in rows.items())
    return f'<section>\n<h2>Made with</h2>\n<dl class="facts">{items}</dl>\n</section>'


def _figure(name: str, heading: str, figure: Any, description: str, caption: str) -> str:
    return (
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">{heading}</h2>\n<figure>'
        f'<div class="drawing">{inline(figure, f"figure-{name}", description)}</div>'
        + (f"<figcaption>{escape(caption)}</figcaption>" if caption else "")
        + "</figure>\n</section>\n"
    )


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int]) -> str:
    def cell(tag: str, i: int, text: str) -> str:
        return f"<{tag}{' class=words' if i in words else ''}>{escape(text)}</{tag.split()[0]}>"

    top = "".join(cell('th scope="col"', i, text) for i, text in enumerate(head))
    body = "".join(
        "<tr>" + "".join(cell('th scope="row"' if i == 0 else "td", i, text) for i, text in enumerate(row)) + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>\n'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
    )


def _percent(share: float, digits: int = 2) -> str:
    return f"{share:.{digits}%}"


def _number(value: float) -> str:
    return f"{value:,.1f}" if value >= 100 else f"{value:.3g}"


BENCH_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "network": ("network", str),
    "runtime": ("runtime", str),
    "batch": ("batch", str),
    "threads": ("threads", str),
    "plain_us": ("plain µs", _number),
    "branchy_us": ("branchy µs", _number),
    "limit_us": ("limit µs", _number),
    "speedup": ("speed-up", lambda v: f"{v:.2f}×"),
    "overhead": ("overhead", lambda v: f"{v:.3f}"),
    "plain_accuracy": ("plain accuracy", _percent),
    "accuracy_branchy": ("branchy accuracy", _percent),
    "exit_share": ("leave at exit, %", lambda v: ", ".join(f"{100 * share:.1f}" for share in v)),
    "thresholds": ("thresholds", thresholds_text),
}
