"""Write the generated blocks of README.md and docs/ from benchmarks/results/*.json, so that no number is typed by hand.

python benchmarks/pages/tables.py            # rewrites the blocks between <!-- generated: NAME --> and <!-- end -->
"""

import re
import statistics
from pathlib import Path

from blocks import BLOCKS, processor, results
from design_blocks import DESIGN
from paper_blocks import PAPER
from runtime_blocks import RUNTIMES

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "docs/choosing.md",
    "docs/designing.md",
    "docs/drift.md",
    "docs/int8.md",
    "docs/networks.md",
    "docs/reproducing.md",
    "docs/runtimes.md",
    "docs/scores.md",
    "docs/speed.md",
)


def speed():
    found = results("mnist_speed")
    lines = [
        "| batch | plain | B-LeNet | limit | speed-up | overhead | plain accuracy | accuracy B-LeNet | exit 1 |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r['batch']} | {r['plain_us']:.1f} us | {r['branchy_us']:.1f} us | {r['limit_us']:.1f} us "
        f"| **{r['speedup']:.2f}x** | {r['overhead']:.2f} | {r['plain_accuracy']:.2%} | {r['accuracy_branchy']:.2%} "
        f"| {r['exit_share'][0]:.1%} |"
        for r in found["rows"]
    ]
    where = found["environment"]
    return [
        *lines,
        "",
        f"Microseconds per sample, one thread, medians of {len(found['trials']) // len(found['rows'])} trials; "
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
        f"Does joint training improve the last exit? LeNet and B-LeNet were trained with {len(rows)} seeds each, for "
        f"the same total epochs and with the same augmentation. On average, LeNet has {mean['lenet_test']:.2%} and "
        f"the last exit of B-LeNet {mean['last_exit_test']:.2%}: "
        f"{_verdict(lift)} B-LeNet with early exits has {mean['b_lenet_test']:.2%}, with {share:.1%} leaving at exit "
        f"1: {_verdict(whole)} The shipped networks have seed {shipped['seed']}, which has the best validation "
        f"accuracy of B-LeNet. The shipped LeNet has {shipped['lenet_test']:.2%} on test images; over the seeds, LeNet "
        f"ranges from {low:.2%} to {high:.2%}, so the gap between the shipped two is chance. "
        f"Made by `{found['command']}`.",
    ]


def _verdict(difference):
    low, high = difference["interval_points"]
    shown = f"{difference['mean_points']:+.3f} points, 95% interval {low:+.3f} to {high:+.3f}"
    if low > 0:
        return f"{shown}, a gain."
    return f"{shown}, a loss." if high < 0 else f"{shown}, no significant difference."


def overhead():
    found = results("overhead_profile")
    lines = [
        "| batch | file, per call | static graph up to exit 1, per call | difference | overhead |",
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
    return [*lines, "", f"One thread, {processor(found)}. Made by `{found['command']}`."]


def calls():
    """The time that a call takes beyond ``session.run``, one table per processor."""
    found = results("call_overhead")
    lines = []
    for machine in found["machines"]:
        lines += [f"| {processor(machine)} | per call | beyond `session.run` |", "|---|--:|--:|"]
        lines += [f"| `{r['call']}` | {r['us']:.1f} us | {r['beyond_us']:.1f} us |" for r in machine["rows"]]
        lines.append("")
    return [*lines, f"B-LeNet, one sample per call, one thread; medians. Made by `{found['command']}`."]


def stages():
    found = results("stages")
    lines = [
        "| network | leave at, % | nested file | stages, all answers | stage 1 | first answer "
        "| thresholds per sample | in stages |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for r in found["rows"]:
        us = r["us_a_call"]
        early = f"{us['first_answer']:.0f} us" if r["exit_share"][0] else ""
        lines.append(
            f"| {r['network']} | {'/'.join(f'{100 * share:.0f}' for share in r['exit_share'])} | {us['nested']:.0f} us "
            f"| {r['staged_to_nested'] - 1:+.1%} | {us['stage_1']:.0f} us | {early} "
            f"| {r['per_sample_to_shared'] - 1:+.1%} | {r['staged_per_sample_to_shared'] - 1:+.1%} |"
        )
    return [
        *lines,
        "",
        f"Batches of {found['rows'][0]['batch']} test images, one thread, medians of processor time per call; "
        f"{processor(found)}. Thresholds per sample are compared with shared thresholds in the same file. "
        f"Made by `{found['command']}`.",
    ]


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
        f"The fastest plain network that is at most 0.05 points below B-LeNet is {best['network']}: B-LeNet is "
        f"{best['us_batch_1'] / b_lenet['us_batch_1']:.2f}x faster at batch 1 and "
        f"{best['us_batch_64'] / b_lenet['us_batch_64']:.2f}x at batch 64. The names give the channels of the three "
        f"convolutions; LeNet has 5-10-20. One seed per network; {processor(found)}. Made by `{found['command']}`.",
    ]


def cascade():
    found = results("cascade")
    lines = ["| training | network | accuracy | leave at, % | batch 1 | batch 64 |", "|---|---|--:|---|--:|--:|"]
    lines += [
        f"| {r['epochs']} epochs | {r['network']}{'' if r['reached'] else ', not reached'} | {r['accuracy']:.1%} "
        f"| {'/'.join(f'{100 * share:.0f}' for share in r['exit_share'])} | {r['us_batch_1'] / 1000:.2f} ms "
        f"| {r['us_batch_64'] / 1000:.2f} ms |"
        for r in sorted(found["rows"], key=lambda r: (r["epochs"], r["us_batch_1"]))
    ]
    return [
        *lines,
        "",
        f"CIFAR-10, time per sample on one thread, while other programs used the machine; all files of a training took "
        f"turns. *cascade* is ResNet-20, then ResNet-110. Thresholds ({found['score']}) are chosen on "
        f"{found['images']:,} validation images at the accuracy of ResNet-110 there; *not reached* means that no "
        f"thresholds did. Accuracy is that of {found['images']:,} test images; one point is about one standard error. "
        f"{processor(found)}, ONNX Runtime {found['environment']['onnxruntime']}. Made by `{found['command']}`.",
    ]


def training_cost():
    found = results("training_cost")
    return [
        f"An epoch of joint training of B-LeNet takes {found['ratio']:.2f} times as long as an epoch of LeNet, and "
        f"{found['work_ratio']:.2f} times as many multiply-accumulates; {processor(found)}. "
        f"Made by `{found['command']}`.",
    ]


_DRIFTS = {"none": "none", "noise": "growing noise", "rotation": "rotation", "classes": "digits 5 to 9 only"}
_DRIFTS |= {"five": "only five digits, at random", "eight": "only eight digits, at random"}


def drift_false():
    found = results("drift")
    rates = [a["stated"] for a in found["unshifted"][0]["alarms"]]
    lines = ["| calibration and stream | samples per stream |" + "".join(f" stated {r:.0%} |" for r in rates)]
    lines += ["|---|--:|" + "--:|" * len(rates)]
    lines += [
        f"| {r['setting']} | {r['samples']:,} |" + "".join(f" {a['alarms'] / r['streams']:.1%} |" for a in r["alarms"])
        for r in found["unshifted"]
    ]
    return [*lines, "", f"{found['unshifted'][0]['streams']:,} streams per row. Made by `{found['command']}`."]


def drift_seen():
    found = results("drift")
    rows = [*found["shifted"], *found["classes"]]
    lines = [
        "| drift | quiet before | seen in time | median delay | 95% delay | false alarms before |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {_DRIFTS[r['kind']]}{'' if r['labels_too'] else ', labels not given'} | {r['quiet']:,} "
        f"| {r['seen_within_delay'] / r['streams']:.1%} | {_samples(r['delay_median'])} | {_samples(r['delay_95'])} "
        f"| {r['alarms_before_the_change'] / r['streams']:.1%} |"
        for r in rows
    ]
    return [
        *lines,
        "",
        f"Delays are in samples. *In time* means within {rows[0]['delay_allowed']:,} samples of the change. In these, "
        "noise grows from 0 to a standard deviation of 0.6 (pixels are in 0 to 1), and rotation to 60 degrees; classes "
        f"change from one sample to the next. {rows[0]['streams']:,} streams per row, {found['calibration']:,} "
        "calibration images, 1% stated. "
        f"Made by `{found['command']}`.",
    ]


def _samples(delay):
    return "never" if delay is None else f"{delay:,.0f}"


def drift_budget():
    found = results("drift")
    rows = found["budget"]
    lines = [
        "| drift | goal | batch | worst error | worst error of any 2,000 | cost, thresholds fixed "
        "| accuracy held | accuracy fixed |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {_DRIFTS[r['kind']]} | {r['goal_us']:.1f} us | {r['batch']} | {r['error_after_2000_worst']:.1%} "
        f"| {r['error_rolling_2000_worst']:.1%} | {r['fixed_error']:+.1%} | {r['accuracy']:.2%} "
        f"| {r['fixed_accuracy']:.2%} |"
        for r in rows
    ]
    low, high = found["cost_us"][0], found["cost_us"][-1]
    return [
        *lines,
        "",
        f"Errors are relative to the goal, and the worst over {rows[0]['streams']} streams of "
        f"{rows[0]['samples']:,} samples. "
        f"Leaving at exit 1 costs {low:.1f} us, at exit 2 {high:.1f} us (batch 1, one thread, "
        f"{processor(found)}, a busy machine). Made by `{found['command']}`.",
    ]


def drift_deployed():
    found = results("drift")["deployed"]
    quiet = "alarmed" if found["clean_alarmed"] else "did not alarm"
    return [
        f"The exported file on {found['samples']:,} test images in batches of 64, calibrated on a PyTorch record of "
        f"the validation images. Shuffled: the monitor {quiet}. In the order of the data file: "
        f"{found['ordered_alarm']}. With growing noise: {found['noisy_alarm']}; with the thresholds of the controller, "
        f"the same images cost {found['mean_us']:.2f} us on average for a goal of {found['goal_us']:.2f} us; "
        f"{processor(results('drift'))}.",
    ]


def scores():
    found = results("scores")
    networks = {}
    for network in found["networks"]:
        rows = {row["score"]: row for row in network["rows"]}
        networks.setdefault(network["network"], []).append((network["last_accuracy"], rows))
    names = [row["score"] for row in found["networks"][-1]["rows"]]
    titles = "".join(f" {name}{f', {len(n)} seeds' if len(n) > 1 else ''} |" for name, n in networks.items())
    lines = [f"| work, % of the plain network's |{titles} the score's time |", "|---|" + "--:|" * (len(networks) + 1)]
    for name in names:
        cells = "".join(f" {_work([rows[name] for _, rows in n if name in rows])} |" for n in networks.values())
        us = found["score_us"].get(name)
        lines.append(f"| {name} |{cells} {'' if us is None else f'{us:.1f} us'} |")
    lines += ["", f"| AUROC, early exits |{titles}", "|---|" + "--:|" * len(networks)]
    for name in names:
        cells = "".join(f" {_auroc([rows[name] for _, rows in n if name in rows])} |" for n in networks.values())
        lines.append(f"| {name} |{cells}")
    lines += ["", f"| accuracy, last exit |{titles}", "|---|" + "--:|" * len(networks)]
    lines.append("| alone |" + "".join(f" {_mean([last for last, _ in n]):.2%} |" for n in networks.values()))
    for name in ("equal", "logits", "fitted"):
        at = f"average ({name}), max_probability"
        cells = "".join(f" {_mean([rows[at]['last_accuracy'] for _, rows in n]):.2%} |" for n in networks.values())
        lines.append(f"| average ({name}) |{cells}")
    return [
        *lines,
        "",
        f"Means on test images over {len(found['splits'])} random halvings of the validation images, and over training "
        "seeds. Work is in multiply-accumulates: first at the accuracy of the last exit alone, then at "
        f"{100 * found['targets'][1]:g} points below it. Bold: significantly less than entropy (paired, 95%; over "
        "seeds if there are several, otherwise over halvings only). All scores choose on one half, "
        "although named scores could choose on both. The time of a score is what it adds to an exit at batch 1, in a "
        f"network whose first two exits take {found['score_us']['network']:.0f} us without it; {processor(found)}. "
        f"Made by `{found['command']}`.",
    ]


T_HALVINGS, T_SEEDS = 2.093, {2: 12.706, 3: 4.303, 4: 3.182}  # Student's t, 97.5%


def _mean(values):
    return sum(values) / len(values)


def _work(rows):
    """Means over seeds, bold if significantly below entropy."""
    cells = []
    for i in range(len(rows[0]["cost"]) if rows else 0):
        cost, less = (_mean([row[key][i] for row in rows]) for key in ("cost", "minus_entropy"))
        if len(rows) == 1:
            allowed = T_HALVINGS * rows[0]["minus_entropy_error"][i]
        else:
            spread = statistics.stdev(row["minus_entropy"][i] for row in rows)
            allowed = T_SEEDS[len(rows)] * spread / len(rows) ** 0.5
        cells.append(f"**{cost:.1f}**" if less < -allowed else f"{cost:.1f}")
    return " / ".join(cells)


def _auroc(rows):
    exits = zip(*(row["auroc"][:-1] for row in rows), strict=True)
    return " / ".join(f"{_mean(exit):.3f}" for exit in exits)


TABLES = {
    **BLOCKS,
    **DESIGN,
    **PAPER,
    **RUNTIMES,
    "calls": calls,
    "cascade": cascade,
    "drift_budget": drift_budget,
    "drift_deployed": drift_deployed,
    "drift_false": drift_false,
    "drift_seen": drift_seen,
    "overhead": overhead,
    "scores": scores,
    "smaller": smaller,
    "speed": speed,
    "stages": stages,
    "training": training,
    "training_cost": training_cost,
}


def filled(text):
    """Return the page with every generated block rewritten."""

    def block(match):
        return "\n".join([match[1], *TABLES[match[2]](), "<!-- end -->"])

    return re.sub(r"(<!-- generated: (\w+) -->)\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def main():
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
