"""Generated blocks for `tables.py` about where exits go, from benchmarks/results/design.json."""

from blocks import results

TITLES = {"b_lenet": "LeNet, MNIST", "b_alexnet": "AlexNet, CIFAR-10", "b_resnet110": "ResNet-110, CIFAR-10"}
TITLES |= {"text": "transformer, source code"}
GOALS = {("b_lenet", 1): 2.5, ("b_lenet", 64): 6.0, ("b_alexnet", 1): 2.2, ("b_resnet110", 1): 3.0}  # at least
ORDER = ("published", "even", "designed")


def _rows():
    rows = [row for row in results("design")["rows"] if "measured_us" in row]
    return sorted(rows, key=lambda r: (list(TITLES).index(r["network"]), r["batch"], ORDER.index(r["design"])))


def _asked(row):
    below = row["below_points"]
    return "" if not below else f", {-below:+.1f} points asked"


def first_table():
    """LeNet with the paper's branch and with designed exits; every answer is that of the exit taken."""
    lines = [
        "| batch | exits | static | with exits | limit | speed-up | overhead | accuracy static | with exits | exit 1 |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r['batch']} | {r['design']}{_asked(r)} | {r['static_us']:.1f} us | {r['measured_us']:.1f} us "
        f"| {r['measured_us'] / r['overhead']:.1f} us | **{r['speedup']:.2f}x** | {r['overhead']:.2f} "
        f"| {r['accuracy_baseline']:.2%} | {r['accuracy']:.2%} | {r['exit_share'][0]:.1%} |"
        for r in _rows()
        if r["network"] == "b_lenet" and r["answers"] == "of the exit" and r["design"] != "even"
    ]
    where = results("design")["environment"]
    return [
        *lines,
        "",
        f"Microseconds a sample, one thread; {where['processor']}, ONNX Runtime {where['onnxruntime']}. Made by "
        "`python benchmarks/design.py b_lenet`.",
    ]


def designs():
    """Every design, measured beside what was predicted."""
    lines = [
        "| network | batch | exits | answers | accuracy | plain | exits alone | speed-up | predicted | us | predicted "
        "| overhead |",
        "|---|--:|---|---|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    for r in _rows():
        off = r["measured_us"] / r["predicted_us"] - 1
        lines.append(
            f"| {TITLES[r['network']]} | {r['batch']} | {r['design']}: {', '.join(r['taps'])}{_asked(r)} "
            f"| {r['answers']} | {r['accuracy']:.2%} | {r['accuracy_baseline']:.2%} "
            f"| {', '.join(f'{a:.1%}' for a in r['exit_accuracy'])} | **{r['speedup']:.2f}x** "
            f"| {r['predicted_speedup']:.2f}x | {r['measured_us']:.1f} | {r['predicted_us']:.1f} ({off:+.0%}) "
            f"| {r['overhead']:.2f} |"
        )
    where = results("design")["environment"]
    return [
        *lines,
        "",
        f"One thread, {where['processor']}, ONNX Runtime {where['onnxruntime']}. Made by `python benchmarks/design.py "
        "NETWORK`; what is predicted is on disk before anything is measured.",
    ]


def design_goals():
    """What was wanted of the designed exits, and what holds them back."""
    lines = [
        "| network | batch | answers | wanted | speed-up | beside plain, points | at best | engine's floor |",
        "|---|--:|---|--:|---|--:|--:|--:|",
    ]
    for r in _rows():
        goal = GOALS.get((r["network"], r["batch"]))
        if r["design"] == "designed" and goal is not None:
            best = r["predicted_speedup"] * r["predicted_us"] / r["oracle_us"]  # both of the same moment
            short = f", short by {goal - r['speedup']:.2f}" if r["speedup"] < goal else ""
            lines.append(
                f"| {TITLES[r['network']]} | {r['batch']} | {r['answers']}{_asked(r)} | {goal:.1f}x "
                f"| **{r['speedup']:.2f}x**{short} | {100 * (r['accuracy'] - r['accuracy_baseline']):+.2f} "
                f"| {best:.1f}x | {r['static_us'] / r['floor_us']:.1f}x |"
            )
    return lines


def design_rivals():
    """What a user would pick instead of designed exits."""
    told = []
    for row in results("reproduce/table1")["networks"]:
        plain = row["plain"]
        others = [f"{s['network']} {s['accuracy']:.2%} at {plain['us'] / s['us']:.2f}x" for s in row["smaller"]]
        told.append(f"beside {plain['network']} ({plain['accuracy']:.2%}) {', '.join(others)}")
    return [f"Smaller plain networks by the same recipe, one sample a call: {'; '.join(told)}."]


def advising():
    """How long advice takes."""
    found = results("advising")
    told = "; ".join(
        f"{r['network']} {r['minutes']:.1f} minutes for {r['candidates']} heads (wanted: {r['wanted_minutes']})"
        for r in found["rows"]
    )
    return [f"`advise` on {found['environment']['cores']} cores: {told}. Made by `{found['command']}`."]


DESIGN = {
    "advising": advising,
    "first_table": first_table,
    "designs": designs,
    "design_goals": design_goals,
    "design_rivals": design_rivals,
}
