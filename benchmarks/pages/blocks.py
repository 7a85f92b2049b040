"""Generated blocks for `tables.py`: third-party networks, int8, choosing. A function returns the lines of one block."""

import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
INT8_TARGET = 0.5  # points below float, at most


def results(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def processor(*found):
    """Return the processor that all given result files or rows name. Raise `ValueError` if they name several."""
    names = {f["processor"] if "processor" in f else f["environment"]["processor"] for f in found}
    if len(names) > 1:
        raise ValueError(f"one table would mix processors: {sorted(names)}")
    return names.pop()


def _shares(row):
    return "/".join(f"{share:.0%}".rstrip("%") for share in row["exit_share"])


def _middle(trials, ratio):
    """The median of a ratio over trials, and their range if there are several."""
    values = [ratio(trial) for trial in trials]
    apart = f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.2f}{apart}"


def architectures():
    found = results("architectures")
    lines = [
        "| network | plain, batch 1 | leave at, % | overhead, batch 1 | graphs in order | samples sorted | batch 64 |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for network in found["networks"]:
        for k in range(2):
            ones, manys = (
                [row for trial in network["trials"] for row in trial["three"][k]["rows"] if row["batch"] == batch]
                for batch in (1, 64)
            )
            lines.append(
                f"| {network['network']} | {statistics.median(o['plain_us'] for o in ones) / 1000:.1f} ms "
                f"| {_shares(ones[0])} | {_middle(ones, lambda o: o['overhead'])} "
                f"| {_middle(ones, lambda o: o['branchy_us'] / o['limit_in_order_us'])} "
                f"| {_middle(ones, lambda o: o['overhead_sorted'])} "
                f"| {_middle(manys, lambda m: m['overhead'])} |"
            )
    where = found["environment"]
    return [
        *lines,
        "",
        f'Three exits from `attach(at="auto")`, one thread, {found["samples"]} samples in random order; medians and '
        f"ranges over all trials; {where['processor']}, ONNX Runtime {where['onnxruntime']}. Made by "
        f"`{found['command']}`.",
    ]


def elsewhere():
    """The overheads on another processor."""
    found = results("architectures-epyc")
    ones = [
        statistics.median(trial["three"][k]["rows"][0]["overhead"] for trial in network["trials"])
        for network in found["networks"]
        for k in range(2)
    ]
    return [
        f"On {found['environment']['processor']}, overheads are {min(ones):.2f}-{max(ones):.2f} at batch 1, and "
        f"{sum(o > 1.1 for o in ones)} of {len(ones)} rows are above 1.10 "
        "(`benchmarks/results/architectures-epyc.json`)."
    ]


def halves():
    found = results("architectures")
    lines = ["| network | cost of the first exit, relative to the network | speed-up |", "|---|--:|--:|"]
    rows = []
    for network in found["networks"]:
        all_halves = [trial["half"] for trial in network["trials"] if "half" in trial]
        share, speedup = (statistics.median(h[key] for h in all_halves) for key in ("cost_share", "speedup"))
        rows.append((share, f"| {network['network']} | {share:.0%} | **{speedup:.2f}x** |"))
    deep = found["deep"]
    return [
        *lines,
        *(line for _, line in sorted(rows)),
        "",
        f"Batches of 64, {processor(found)}; half of the samples leave at the first of two exits. "
        f"Exporting {deep['network']} with two branches takes {deep['export_seconds']:.0f} s. The size of its file is "
        f"{deep['bytes'] / deep['plain_plus_branches_bytes'] - 1:+.1%} relative to the plain file plus the "
        f"weights of the branches. Made by `{found['command']}`.",
    ]


def layout():
    found = results("layout")
    lines = ["| batch | plain | without pooling | none leaves early | without pooling |", "|--:|--:|--:|--:|--:|"]
    for r in found["rows"]:
        cells = [
            f"{r[name]['us'] / r['batch']:.0f} us | +{r[name]['us_without'] / r[name]['us'] - 1:.1%}"
            for name in ("plain", "exits")
        ]
        lines.append(f"| {r['batch']} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"{found['network']} with two early exits, microseconds per sample, one thread; "
        f"{found['environment']['processor']}. Made by `{found['command']}`.",
    ]


def int8_accuracy():
    found = results("int8")
    rows = found["accuracy"]
    lines = [
        "| network | runtime | processor | images | float | int8 | int8-full-range | same bits |",
        "|---|---|---|--:|--:|--:|--:|---|",
    ]
    lines += [
        f"| {r['network']} | {r['runtime']} | {r['processor']} | {r['images']:,} "
        f"| {_exits(r, 'float')} | {_exits(r, 'int8')} | {_exits(r, 'int8-full-range')} "
        f"| {'' if r is _of(rows, r)[0] else 'yes' if 'int8' in r['as_here'] else 'no'} |"
        for r in rows
    ]
    return [
        *lines,
        "",
        "Accuracy per exit, in %. *Same bits*: whether the outputs of the `int8` file equal those on the first "
        "processor, bit by bit on all images of the row.",
        "",
        f"The target is `int8` at most {INT8_TARGET} points below float at every exit on a processor without VNNI. "
        "The list gives the accuracy at the worst exit there: `int8` relative to float, and `int8-full-range` relative "
        "to `int8`.",
        "",
        *(_verdict(rows, network) for network in dict.fromkeys(r["network"] for r in rows)),
        "",
        f"Made by `{found['command']}`.",
    ]


def _exits(row, kind):
    return " / ".join(f"{100 * accuracy:.1f}" for accuracy in row["accuracy"][kind])


def _verdict(rows, network):
    """Whether `int8` reaches the target without VNNI, and what the full range loses there, per runtime."""
    parts = []
    for runtime in dict.fromkeys(r["runtime"] for r in rows):
        without = _of(rows, {"network": network, "runtime": runtime})[-1]
        lead, full = _least(without, "int8", "float"), _least(without, "int8-full-range", "int8")
        reached = "reached" if lead >= -INT8_TARGET else "missed"
        parts.append(f"{runtime} {reached}, {lead:+.2f} points (full range {full:+.2f})")
    return f"- {network}: {'; '.join(parts)}."


def _of(rows, row):
    """The rows of one network and runtime: on the machine that measured, then on one without VNNI."""
    return [r for r in rows if (r["network"], r["runtime"]) == (row["network"], row["runtime"])]


def _least(row, kind, than):
    """By how many points the accuracy of one kind of file is above another's, at the worst exit."""
    return 100 * min(a - b for a, b in zip(row["accuracy"][kind], row["accuracy"][than], strict=True))


def int8_times():
    found = results("int8")
    lines = [
        "| network | runtime | batch | exits | int8 | int8-full-range | both | accuracy float, both |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for r in found["times"]:
        faster, float_exits = r["speedup"], _of(found["accuracy"], r)[0]["accuracy"]["float"]
        lines.append(
            f"| {r['network']} | {r['runtime']} | {r['batch']} | {faster['float_exits']:.2f}x "
            f"| {faster['int8_plain']:.2f}x | {faster['int8-full-range_plain']:.2f}x "
            f"| **{faster['int8_exits']:.2f}x** | {float_exits[-1]:.1%}, {r['accuracy_both']:.1%} |"
        )
    return [
        *lines,
        "",
        "Speed-up over the plain float network in the same runtime. *Exits*: with exits, in float. *int8* and "
        "*int8-full-range*: the plain network in int8. *Both*: with exits, in `int8`. "
        f"Thresholds lose at most {100 * found['max_drop']:g} points on {found['validation']:,} validation images, "
        "without a promise; those for `int8` are chosen on a record of its flat file. "
        f"{processor(*found['times'])}, one thread, medians. Made by `{found['command']}`.",
    ]


def searching():
    found = results("choosing")
    lines = ["| search, 10,000 samples | exits | threshold vectors | seconds | memory |", "|---|--:|--:|--:|--:|"]
    for s in found["search"]:
        vectors = "" if s["vectors"] is None else f"{s['vectors']:,}"
        lines.append(f"| {s['search']} | {s['exits']} | {vectors} | {s['seconds']:.2f} | {s['megabytes']:.0f} MB |")
    lines += [
        "",
        "| record | rival | its points | our cost at its accuracy, worst | median |",
        "|---|---|--:|--:|--:|",
    ]
    lines += [
        f"| {n['network']} | {r['rival']} | {r['points']:,} | {r['worst']:.3f} | {r['median']:.3f} |"
        for n in found["rivals"]
        for r in n["rows"]
    ]
    return [*lines, "", f"{processor(found)}. Made by `{found['command']}`."]


def promises():
    found = results("choosing")
    lines = [
        "| record | limit | bound | broken | mean cost | without a promise | no early exits |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {c['network']} | {c['limit']} {c['value']:g} | {c['bound']} | {c['broken']:.1%} | {c['mean_us']:.1f} us "
        f"| {c['mean_us_without_promise']:.1f} us | {c['never_us']:.1f} us |"
        for c in found["coverage"]
    ]
    first = found["coverage"][0]
    price = "; ".join(f"{p['network']} {p['ratio_on_validation']:.3f}" for p in found["price"])
    return [
        *lines,
        "",
        f"{first['draws']:,} draws per row, 95% confidence: at most 5% may be broken. A promise raises the cost. "
        "For `max_drop` 0.01, with half of the validation images for calibration (5,000 on MNIST and Fashion-MNIST, "
        f"2,500 on CIFAR-10), the cost with a promise, divided by the cost without one, is: {price}. "
        f"Costs were measured on {processor(found)}. "
        f"Made by `{found['command']}`.",
    ]


BLOCKS = {
    "architectures": architectures,
    "elsewhere": elsewhere,
    "halves": halves,
    "int8_accuracy": int8_accuracy,
    "int8_times": int8_times,
    "layout": layout,
    "promises": promises,
    "searching": searching,
}
