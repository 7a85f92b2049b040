"""Write the generated tables into README.md from benchmarks/results/*.json; numbers in prose are never typed.

python benchmarks/tables.py            # rewrites the blocks between <!-- generated: NAME --> and <!-- end -->
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/speed.md")


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def speed():
    found = results("mnist_speed")
    lines = [
        "| batch | static | B-LeNet | limit | speed-up | overhead | accuracy static | accuracy B-LeNet | exit 1 |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r['batch']} | {r['static_us']:.1f} us | {r['branchy_us']:.1f} us | {r['limit_us']:.1f} us "
        f"| **{r['speedup']:.2f}x** | {r['overhead']:.2f} | {r['accuracy_static']:.2%} | {r['accuracy_branchy']:.2%} "
        f"| {r['exit_share'][0]:.1%} |"
        for r in found["rows"]
    ]
    where = found["environment"]
    return [
        *lines,
        "",
        f"Microseconds a sample, one thread, medians of {len(found['trials']) // len(found['rows'])} trials; "
        f"{where['processor']}, ONNX Runtime {where['onnxruntime']}. Made by `{found['command']}`.",
    ]


def training():
    found = results("mnist_training")
    rows = found["rows"]
    mean = {k: sum(r[k] for r in rows) / len(rows) for k in ("lenet_test", "last_exit_test", "b_lenet_test")}
    share = sum(r["exit_share_test"][0] for r in rows) / len(rows)
    shipped = next(r for r in rows if r["seed"] == found["shipped_seed"])
    low, high = min(r["lenet_test"] for r in rows), max(r["lenet_test"] for r in rows)
    lift, whole = found["last_exit_minus_lenet"], found["b_lenet_minus_lenet"]
    return [
        f"Does joint training lift the final exit? Over {len(rows)} seeds, each side trained for the same total "
        f"epochs with the same augmentation: LeNet {mean['lenet_test']:.2%}, "
        f"B-LeNet's last exit alone {mean['last_exit_test']:.2%}: "
        f"{_verdict(lift)} B-LeNet with early exits: {mean['b_lenet_test']:.2%} with {share:.1%} leaving at exit 1: "
        f"{_verdict(whole)} The shipped pair is that of seed {shipped['seed']}, picked by B-LeNet's validation "
        f"accuracy; its LeNet has {shipped['lenet_test']:.2%} on test, where the five range from {low:.2%} to "
        f"{high:.2%}, so read the gap in the table above as luck of the draw. Made by `{found['command']}`.",
    ]


def _verdict(difference):
    low, high = difference["interval_points"]
    told = f"{difference['mean_points']:+.3f} points, 95 % interval {low:+.3f} to {high:+.3f}"
    if low > 0:
        return f"{told}, a gain."
    return f"{told}, a loss." if high < 0 else f"{told}, no difference that five seeds can show."


def overhead():
    found = results("overhead_profile")
    lines = [
        "| batch | branchy, a call | static up to exit 1, a call | difference | overhead |",
        "|--:|--:|--:|--:|--:|",
    ]
    for r in found["rows"]:
        ours, limit = r["branchy_us_a_call"], r["static_upto_exit_1_us_a_call"]
        lines.append(f"| {r['batch']} | {ours:.1f} us | {limit:.1f} us | {ours - limit:.1f} us | {ours / limit:.2f} |")
    kinds = sorted(found["rows"][0]["profiled_share"], key=lambda k: -found["rows"][0]["profiled_share"][k])
    lines += [
        "",
        "| share of a profiled run, all leaving at exit 1 |" + "".join(f" batch {r['batch']} |" for r in found["rows"]),
    ]
    lines += ["|---|" + "--:|" * len(found["rows"])]
    lines += [
        f"| {kind} |" + "".join(f" {r['profiled_share'].get(kind, 0):.1%} |" for r in found["rows"]) for kind in kinds
    ]
    return [*lines, "", f"Made by `{found['command']}`."]


def smaller():
    found = results("mnist_smaller")
    b_lenet = found["rows"][0]
    lines = ["| network | accuracy | batch 1 | batch 64 |", "|---|--:|--:|--:|"]
    lines += [
        f"| {r['network']} | {r['accuracy']:.2%} | {r['us_batch_1']:.1f} us | {r['us_batch_64']:.1f} us |"
        for r in sorted(found["rows"], key=lambda r: r["us_batch_1"])
    ]
    equal = [r for r in found["rows"][1:] if r["accuracy"] >= b_lenet["accuracy"] - 0.0005]
    best = min(equal, key=lambda r: r["us_batch_1"])
    return [
        *lines,
        "",
        f"The cheapest static network within 0.05 points of B-LeNet or above it is {best['network']}: B-LeNet is "
        f"{best['us_batch_1'] / b_lenet['us_batch_1']:.2f}x faster at batch 1 and "
        f"{best['us_batch_64'] / b_lenet['us_batch_64']:.2f}x at batch 64. The names give the channels of the three "
        f"convolutions; LeNet itself has 5-10-20. One seed each. Made by `{found['command']}`.",
    ]


def training_cost():
    found = results("training_cost")
    return [
        f"An epoch of joint training of B-LeNet takes {found['ratio']:.2f} times an epoch of LeNet; its work, "
        f"counted in multiply-accumulates, is {found['work_ratio']:.2f} times as much. Made by `{found['command']}`.",
    ]


TABLES = {
    "overhead": overhead,
    "smaller": smaller,
    "speed": speed,
    "training": training,
    "training_cost": training_cost,
}


def filled(text):
    """The page with every generated block made anew."""

    def block(match):
        return "\n".join([match[1], *TABLES[match[2]](), "<!-- end -->"])

    return re.sub(r"(<!-- generated: (\w+) -->)\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def main():
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
