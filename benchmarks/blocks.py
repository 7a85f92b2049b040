"""More generated blocks for `tables.py`: third-party networks, int8, choosing. Each returns the lines of one block."""

import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def results(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def processor(*found):
    """The processor of result files or rows, which is one: no table mixes what was measured on several."""
    names = {f["processor"] if "processor" in f else f["environment"]["processor"] for f in found}
    if len(names) > 1:
        raise ValueError(f"one table would mix processors: {sorted(names)}")
    return names.pop()


def _shares(row):
    return "/".join(f"{share:.0%}".rstrip("%") for share in row["exit_share"])


def _middle(trials, ratio):
    """The median over trials of a ratio, and how far the trials lie apart where there are several."""
    values = [ratio(trial) for trial in trials]
    apart = f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.2f}{apart}"


def architectures():
    found = results("architectures")
    lines = [
        "| network | static, batch 1 | leave at, % | overhead, batch 1 | graphs in order | samples sorted | batch 64 |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for network in found["networks"]:
        for k in range(2):
            ones, manys = (
                [row for trial in network["trials"] for row in trial["three"][k]["rows"] if row["batch"] == batch]
                for batch in (1, 64)
            )
            lines.append(
                f"| {network['network']} | {statistics.median(o['static_us'] for o in ones) / 1000:.1f} ms "
                f"| {_shares(ones[0])} | {_middle(ones, lambda o: o['overhead'])} "
                f"| {_middle(ones, lambda o: o['branchy_us'] / o['limit_in_order_us'])} "
                f"| {_middle(ones, lambda o: o['overhead_sorted'])} "
                f"| {_middle(manys, lambda m: m['overhead'])} |"
            )
    where = found["environment"]
    return [
        *lines,
        "",
        f'Three exits by `attach(at="auto")`, one thread, {found["samples"]} samples in random order; medians of all '
        f"trials, and their range; {where['processor']}, ONNX Runtime {where['onnxruntime']}. Made by "
        f"`{found['command']}`.",
    ]


def elsewhere():
    """What the same question had for an answer on another processor."""
    found = results("architectures-epyc")
    ones = [
        statistics.median(trial["three"][k]["rows"][0]["overhead"] for trial in network["trials"])
        for network in found["networks"]
        for k in range(2)
    ]
    return [
        f"Earlier, on {found['environment']['processor']}: {min(ones):.2f}-{max(ones):.2f} at batch 1, "
        f"{sum(o > 1.1 for o in ones)} of {len(ones)} rows above 1.10 (`benchmarks/results/architectures-epyc.json`)."
    ]


def halves():
    found = results("architectures")
    lines = ["| network | first exit's cost of the whole | speed-up |", "|---|--:|--:|"]
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
        f"Batches of 64, {processor(found)}, half of them leaving at the first of two exits. "
        f"{deep['network']} with two branches is exported in {deep['export_seconds']:.0f} s; its file is "
        f"{deep['bytes'] / deep['static_plus_heads_bytes'] - 1:+.1%} beside the static file plus the "
        f"weights of the branches. Made by `{found['command']}`.",
    ]


def layout():
    found = results("layout")
    lines = ["| batch | static | without pooling | none leaves early | without pooling |", "|--:|--:|--:|--:|--:|"]
    for r in found["rows"]:
        cells = [
            f"{r[name]['us'] / r['batch']:.0f} us | +{r[name]['us_without'] / r[name]['us'] - 1:.1%}"
            for name in ("static", "exits")
        ]
        lines.append(f"| {r['batch']} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"{found['network']} with two early exits, microseconds a sample, one thread; "
        f"{found['environment']['processor']}. Made by `{found['command']}`.",
    ]


def int8():
    found = results("int8")
    lines = [
        "| engine | network | accuracy | last exit | leave at exit 1 | file |",
        "|---|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {q['engine']} | {q['network']} | {q['accuracy']:.2%} | {_percent(q.get('accuracy_last_exit'))} "
        f"| {q['exit_share'][0]:.1%} | {_kilobytes(q.get('bytes'))} |"
        for q in found["quality"]
    ]
    lines += [
        "",
        "| engine | batch | exits | int8 | both | exits, in int8 |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r['engine']} | {r['batch']} | {r['speedup_exits']:.2f}x | {r['speedup_int8']:.2f}x "
        f"| **{r['speedup_both']:.2f}x** | {r['speedup_exits_in_int8']:.2f}x |"
        for r in found["rows"]
    ]
    return [
        *lines,
        "",
        "Speed-up over the plain float network in the same engine; the last column over the plain int8 one. *Stale*: "
        f"the int8 file with the thresholds of the float network. {found['environment']['processor']}, one thread. "
        f"Made by `{found['command']}`.",
    ]


def _percent(value):
    return "" if value is None else f"{value:.2%}"


def _kilobytes(size):
    return "" if size is None else f"{size / 1024:.0f} KiB"


def searching():
    found = results("choosing")
    lines = ["| search, 10,000 samples | exits | threshold vectors | seconds | memory |", "|---|--:|--:|--:|--:|"]
    for s in found["search"]:
        vectors = "" if s["vectors"] is None else f"{s['vectors']:,}"
        lines.append(f"| {s['search']} | {s['exits']} | {vectors} | {s['seconds']:.2f} | {s['megabytes']:.0f} MB |")
    lines += ["", "| record | rival | its points | our cost at its accuracy, worst | median |", "|---|---|--:|--:|--:|"]
    lines += [
        f"| {n['network']} | {r['rival']} | {r['points']:,} | {r['worst']:.3f} | {r['median']:.3f} |"
        for n in found["rivals"]
        for r in n["rows"]
    ]
    return [*lines, "", f"{processor(found)}. Made by `{found['command']}`."]


def promises():
    found = results("choosing")
    lines = [
        "| record | limit | bound | broken | mean cost | without a promise | never early |",
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
        f"{first['draws']:,} redraws a row, 95 % confidence: at most 5 % may be broken. Cost of the promised choice "
        f"over that of the one without, one point of drop, half of the validation images calibrating "
        f"(5,000 on MNIST and Fashion-MNIST, 2,500 on CIFAR-10): {price}. Costs are of {processor(found)}. "
        f"Made by `{found['command']}`.",
    ]


BLOCKS = {
    "architectures": architectures,
    "elsewhere": elsewhere,
    "halves": halves,
    "int8": int8,
    "layout": layout,
    "promises": promises,
    "searching": searching,
}
