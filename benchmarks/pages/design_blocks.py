"""Generated blocks for `tables.py` about where exits go, from benchmarks/results/design.json."""

import statistics
from collections import Counter

from blocks import processor, results

TITLES = {"b_lenet": "LeNet, MNIST", "b_alexnet": "AlexNet, CIFAR-10", "b_resnet110": "ResNet-110, CIFAR-10"}
TITLES |= {"text": "transformer, source code"}
GOALS = {("b_lenet", 1): 2.5, ("b_lenet", 64): 6.0, ("b_alexnet", 1): 2.2, ("b_resnet110", 1): 3.0}  # at least
ORDER = ("published", "even", "designed")
NEARLY_ALL = 0.995


def _here():
    """The processor that design.json has the most rows of."""
    return Counter(processor(row) for row in results("design")["rows"]).most_common(1)[0][0]


def _rows():
    """Measured rows of one processor, in the order of tables.

    Of limits out of reach that have the same thresholds, the first alone.
    """
    rows, seen, here = [], set(), _here()
    for row in results("design")["rows"]:
        if processor(row) != here:
            continue
        kind = row["network"], row["batch"], row["design"], row["answers"], *row.get("exit_share", ())
        if "measured_us" in row and (row["reached"] or kind not in seen):
            rows.append(row)
            seen |= set() if row["reached"] else {kind}
    return sorted(rows, key=lambda r: (list(TITLES).index(r["network"]), r["batch"], ORDER.index(r["design"])))


def _asked(row):
    below = row["below_points"]
    asked = "" if not below else f", {-below:+.1f} points asked"
    return asked if row["reached"] else f"{asked}, not reached"


def first_table():
    """LeNet with the paper's branch and with designed exits; a sample's answer is that of the exit it leaves at."""
    lines = [
        "| batch | exits | plain | with exits | limit | speed-up | overhead | plain accuracy | with exits | exit 1 |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r['batch']} | {r['design']}{_asked(r)} | {r['plain_us']:.1f} us | {r['measured_us']:.1f} us "
        f"| {r['measured_us'] / r['overhead']:.1f} us | **{r['speedup']:.2f}x** | {r['overhead']:.2f} "
        f"| {r['plain_accuracy']:.2%} | {r['accuracy']:.2%} | {r['exit_share'][0]:.1%} |"
        for r in _rows()
        if r["network"] == "b_lenet" and r["answers"] == "of the exit" and r["design"] != "even"
    ]
    return [
        *lines,
        "",
        f"Microseconds per sample, one thread; {_machine()}. "
        "Made by `python benchmarks/experiments/design.py b_lenet`.",
    ]


def _machine():
    return f"{_here()}, ONNX Runtime {results('design')['environment']['onnxruntime']}"


def processors():
    """Speed-ups on this machine with all instructions and with some hidden, and those on another processor."""
    here = results("processors")
    found = {(r["network"], r["batch"], r["kind"]): r["speedup"] for r in here["rows"]}
    kinds = list(dict.fromkeys(kind for _, _, kind in found))
    lines = ["| designed exits | batch | " + " | ".join(kinds) + " |", "|---|--:|" + "--:|" * len(kinds)]
    for network, batch in sorted({key[:2] for key in found}, key=lambda key: (key[0] != "B-LeNet", *key)):
        lines.append(f"| {network} | {batch} | {' | '.join(f'{found[network, batch, k]:.2f}x' for k in kinds)} |")
    far = results("mnist_speed")
    speed = " and ".join(f"{r['speedup']:.2f}x at batch {r['batch']}" for r in far["rows"])
    return [
        "**Speed-ups depend on the processor**, so each table has rows of one processor only.",
        "",
        *lines,
        "",
        f"One thread; {processor(here)}. In the last column AVX-512, VNNI and AMX are hidden from the runtime, so it "
        "runs the kernels of a processor with AVX2 only, at the clock and with the caches of this machine. "
        f"Thresholds are chosen on {here['chosen_on']:,} validation images, so the speed-ups differ from "
        f"those in other tables. Made by `{here['command']}`.",
        "",
        f"On {processor(far)}, the published branch of B-LeNet, at which {far['rows'][0]['exit_share'][0]:.1%} leave, "
        f"gives {speed} ([Speed](docs/speed.md)). [Networks](docs/networks.md) reports the overheads of other networks "
        f"on {processor(results('architectures-epyc'))}. `branchynet bench` measures your processor.",
    ]


def designs():
    """Every design, measured and predicted."""
    lines = [
        "| network | batch | exits | answers | accuracy | plain | exits alone | speed-up | predicted | us | predicted "
        "| overhead |",
        "|---|--:|---|---|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    for r in _rows():
        lines.append(
            f"| {TITLES[r['network']]} | {r['batch']} | {r['design']}: {', '.join(r['taps'])}{_asked(r)} "
            f"| {r['answers']} | {r['accuracy']:.2%} | {r['plain_accuracy']:.2%} "
            f"| {', '.join(f'{a:.1%}' for a in r['exit_accuracy'])} | **{r['speedup']:.2f}x** "
            f"| {r['predicted_speedup']:.2f}x | {r['measured_us']:.1f} | {r['predicted_us']:.1f} ({_off(r):+.0%}) "
            f"| {r['overhead']:.2f} |"
        )
    return [
        *lines,
        "",
        f"One thread, {_machine()}. Made by `python benchmarks/experiments/design.py "
        "NETWORK`, which stores its predictions before it measures.",
    ]


def predictions():
    """How far measured times are from predicted ones, and how much of that is the speed of the machine."""
    rows = _rows()
    off, beside = [[abs(which(row)) for row in rows] for which in (_off, _off_beside_plain)]
    pace = [abs(row["plain_us"] / (row["predicted_speedup"] * row["predicted_us"]) - 1) for row in rows]
    lines = [
        f"Relative to the plain network, the measured times of the {len(rows)} rows differ from the predicted times by "
        f"{statistics.median(beside):.0%} in the median and {max(beside):.0%} at most, on {_here()}; the goal is 15%."
    ]
    beyond = [_where(row) for row in rows if abs(_off_beside_plain(row)) > 0.15]
    if beyond:
        lines.append(f"Rows beyond that: {len(beyond)} ({'; '.join(beyond)}).")
    lines.append(
        f"In microseconds they differ by {statistics.median(off):.0%} in the median and {max(off):.0%} at most, and "
        f"{sum(o > 0.15 for o in off)} rows by more than 15%. The speed of the machine changed in between: the time of "
        f"the plain network changed by {statistics.median(pace):.0%} in the median and {max(pace):.0%} at most."
    )
    return lines


def single_exits():
    """Designs in which one exit answers nearly every sample."""
    return [
        f"On {TITLES[row['network']]}, batch {row['batch']}, {row['exit_share'][0]:.1%} of the samples leave at "
        f"the first designed exit. This exit alone has an accuracy of {row['exit_accuracy'][0]:.2%}; the plain network "
        f"has {row['plain_accuracy']:.2%}. The designer found a better small network there, and the later stages are "
        "not needed. In such a case, use that exit alone."
        for row in _rows()
        if row["design"] == "designed" and row["answers"] == "of the exit" and not row["below_points"]
        if row["exit_share"][0] > NEARLY_ALL
    ]


def _off(row):
    return row["measured_us"] / row["predicted_us"] - 1


def _off_beside_plain(row):
    return row["predicted_speedup"] / row["speedup"] - 1


def _where(row):
    where = f"{TITLES[row['network']]}, batch {row['batch']}, {row['design']}, {row['answers']}"
    return f"{where}{_asked(row)} ({_off_beside_plain(row):+.0%})"


def design_goals():
    """The wanted and the measured speed-up of designed exits, and what limits it."""
    lines = [
        "| network | batch | answers | wanted | speed-up | above plain, points | at best | engine's floor |",
        "|---|--:|---|--:|---|--:|--:|--:|",
    ]
    for r in _rows():
        goal = GOALS.get((r["network"], r["batch"]))
        if r["design"] == "designed" and goal is not None:
            best = r["predicted_speedup"] * r["predicted_us"] / r["oracle_us"]  # both of the same moment
            short = f", short by {goal - r['speedup']:.2f}" if r["speedup"] < goal else ""
            lines.append(
                f"| {TITLES[r['network']]} | {r['batch']} | {r['answers']}{_asked(r)} | {goal:.1f}x "
                f"| **{r['speedup']:.2f}x**{short} | {100 * (r['accuracy'] - r['plain_accuracy']):+.2f} "
                f"| {best:.1f}x | {r['plain_us'] / r['floor_us']:.1f}x |"
            )
    return [*lines, "", f"One thread, {_machine()}."]


def design_rivals():
    """The smaller plain networks that are the alternative to designed exits."""
    groups = []
    table = results("reproduce/table1")
    for row in table["networks"]:
        plain = row["plain"]
        others = [f"{s['network']} {s['accuracy']:.2%} at {plain['us'] / s['us']:.2f}x" for s in row["smaller"]]
        groups.append(f"for {plain['network']} ({plain['accuracy']:.2%}), {', '.join(others)}")
    whole, *fewer = results("text_smaller")["rows"]
    others = [
        f"{row['blocks']} blocks {row['accuracy']:.2%} at {whole['us_batch_1'] / row['us_batch_1']:.2f}x "
        f"(batch 64: {whole['us_batch_64'] / row['us_batch_64']:.2f}x)"
        for row in fewer
    ]
    groups.append(f"for the transformer of {whole['blocks']} blocks ({whole['accuracy']:.2%}), {', '.join(others)}")
    where = processor(table, results("text_smaller"))
    return [f"Smaller plain networks with the same recipe, one sample per call, {where}: {'; '.join(groups)}."]


def advising():
    """How long `advise` takes."""
    found = results("advising")
    rows = "; ".join(
        f"{r['minutes']:.1f} minutes for {r['candidates']} branches on {r['network']} (goal: {r['wanted_minutes']})"
        for r in found["rows"]
    )
    where = f"{found['environment']['cores']} cores, {processor(found)}"
    return [f"`advise` takes {rows}; {where}. Made by `{found['command']}`."]


DESIGN = {
    "advising": advising,
    "first_table": first_table,
    "processors": processors,
    "designs": designs,
    "predictions": predictions,
    "single_exits": single_exits,
    "design_goals": design_goals,
    "design_rivals": design_rivals,
}
