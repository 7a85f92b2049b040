"""Generated blocks for `tables.py` about the paper's evaluation, from benchmarks/results/reproduce/."""

from blocks import processor, results

from branchynet.reproduce.table1 import dominated, table

GOALS = {"b_alexnet": 1.9}  # times faster, at the plain network's accuracy


def rivals():
    """The first sentences of the page: which smaller plain networks are the better choice."""
    found = results("reproduce/table1")["networks"]
    better = [(row, rival) for row in found if (rival := dominated(row))]
    if better:
        listed = "; ".join(f"{_beside(row, rival)}, and is more accurate" for row, rival in better)
        first = f"**With the paper's branches, a smaller plain network is the better choice:** {listed}."
    else:
        first = (
            "No smaller plain network with the same recipe is both as accurate and as fast as the networks with "
            "branches below."
        )
    near = [(row, rival) for row in found if (rival := _near(row))]
    if near:
        listed = "; ".join(_beside(row, rival) for row, rival in near)
        first += f" **If you can spare a point of accuracy, a smaller network is the better choice:** {listed}."
    return [f"{first} Times are from {processor(results('reproduce/table1'))}."]


def _near(row):
    """The fastest smaller network at most a point less accurate than ours and at least twice as fast, if any."""
    first = row["branchy"][0]
    near = [s for s in row["smaller"] if s["accuracy"] >= first["accuracy"] - 0.01 and 2 * s["us"] <= first["us"]]
    return min(near, key=lambda s: s["us"], default=None)


def _beside(row, rival):
    first = row["branchy"][0]
    return (
        f"{rival['network']} has {rival['accuracy']:.2%} at {row['plain']['us'] / rival['us']:.2f}x, and "
        f"{first['network']} has {first['accuracy']:.2%} at {first['gain']:.2f}x"
    )


def table_1():
    found = results("reproduce/table1")
    where = found["environment"]
    return [
        *table(found["networks"]).splitlines(),
        "",
        f"{where['processor']}, ONNX Runtime {where['onnxruntime']}. Made by `{found['command']}`.",
    ]


def in_short():
    """The networks of the paper, one per row: ours at the plain network's validation accuracy, and the published."""
    found = results("reproduce/table1")
    better = {r["network"]: r for r in results("design")["rows"] if _designed(r) and processor(r) == processor(found)}
    lines = [
        "| network | plain | with the paper's branches | speed-up, everything timed | averaged answers "
        "| designed exits | reported in the paper (plain to branchy accuracy; trunk time only) |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found["networks"]:
        plain, first, theirs = row["plain"], row["branchy"][0], row["published"]
        mean = next((point for point in row["branchy"] if point["network"].endswith("averaged")), None)
        averaged = f"{mean['accuracy']:.2%}, **{mean['gain']:.2f}x**" if mean else "not measured"
        lines.append(
            f"| {first['network']} | {plain['accuracy']:.2%} | {first['accuracy']:.2%} | **{first['gain']:.2f}x** "
            f"| {averaged} | {_beside_plain(better.get(row['name']))} "
            f"| {theirs['plain_accuracy']:.2%} to {theirs['accuracy']:.2%}, {theirs['cpu_gain']:.1f}x |"
        )
    where = processor(found, *better.values())
    worse = "; ".join(text for row in found["networks"] if (text := _less_accurate(row, better.get(row["name"]))))
    return [
        *lines,
        "",
        f"Points below the plain network on test images: {worse or 'none'}.",
        "",
        f"Batch 1, one thread, {where}. Made by `{found['command']}`.",
    ]


def _less_accurate(row, better):
    """Which columns of a row are less accurate than the plain network beside them, and by how many points."""
    plain, first = row["plain"]["accuracy"], row["branchy"][0]
    beside = [("the paper's branches", first["accuracy"], plain)]
    beside += [
        ("averaged answers", point["accuracy"], plain)
        for point in row["branchy"]
        if point["network"].endswith("averaged")
    ][:1]
    if better is not None:
        beside.append(("designed exits", better["accuracy"], better["plain_accuracy"]))
    below = [f"{name} {100 * (of - accuracy):.2f}" for name, accuracy, of in beside if round(of - accuracy, 6) > 0]
    return f"{first['network']} with {', '.join(below)}" if below else ""


def _designed(row):
    """Whether a row has designed exits, one sample per call, answers of the exit taken, and no extra accuracy asked."""
    kind = row["batch"], row["design"], row["answers"], row["below_points"]
    return kind == (1, "designed", "of the exit", 0.0) and "measured_us" in row


def _beside_plain(row):
    if row is None:
        return ""
    return f"{row['accuracy']:.2%} (plain {row['plain_accuracy']:.2%}), **{row['speedup']:.2f}x**"


def earlier():
    """The gains of earlier runs and of the stored run: how much the times vary."""
    before = {}
    runs = results("table1-earlier")["runs"]
    where = processor(results("reproduce/table1"), *runs)
    for run in runs:
        for point in (point for row in run["networks"] for point in row["branchy"]):
            before.setdefault((point["network"], point["asked_on_validation"]), []).append(f"{point['gain']:.2f}x")
    pairs = [
        f"{p['network']}, {p['asked_on_validation']:.2%} asked: {', '.join(before[key])}, now {p['gain']:.2f}x"
        for t in results("reproduce/table1")["networks"]
        for p in t["branchy"]
        if (key := (p["network"], p["asked_on_validation"])) in before
    ]
    return [f"Gains in earlier runs on {where}, with the same weights and thresholds: {'; '.join(pairs)}."]


def held_back():
    lines = [
        "| network | exits alone | above plain, points | gain | wanted | at best | overhead | graphs in order "
        "| images sorted |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in results("reproduce/table1")["networks"]:
        for point in row["branchy"]:
            goal = GOALS.get(row["name"])
            short = "" if goal is None else f"{goal:.1f}x, short by {max(0.0, goal - point['gain']):.2f}"
            held = "" if point["reached_on_validation"] else ", not reached by any thresholds"
            beside = 100 * (point["accuracy"] - row["plain"]["accuracy"])
            lines.append(
                f"| {point['network']}, {point['asked_on_validation']:.2%} asked on validation{held} "
                f"| {', '.join(f'{a:.1%}' for a in row['exit_accuracy'])} | {beside:+.2f} "
                f"| {point['gain']:.2f}x | {short} | {row['oracle_gain']:.2f}x | {point['overhead']:.2f} "
                f"| {point['us'] / point['limit_in_order_us']:.2f} | {point['overhead_sorted']:.2f} |"
            )
    return [*lines, "", f"Batch 1, one thread, {processor(results('reproduce/table1'))}."]


def approximate():
    listed = results("cifar_training-b_alexnet")["approximate_images"]
    return [
        f"Of the 60,000 images in the copy used here, {sum(listed.values())} are close approximations of the published "
        f"images: {listed['train']} training and validation images, and {listed['test']} test images."
    ]


def trainings():
    """How the shipped CIFAR-10 weights were trained."""
    lines = [
        "| weights | epochs | accuracy of each exit, test | hours | processor | seed |",
        "|---|---|---|--:|---|--:|",
    ]
    for name in ("b_alexnet", "b_resnet110"):
        found = results(f"cifar_training-{name}")
        for part, row in found["rows"].items():
            begun = f"{row['epochs']} from {row['start']}" if "start" in row else f"{row['epochs']}"
            title = f"{name.removeprefix('b_')}, {part}" if part in ("baseline", "continued") else part
            lines.append(
                f"| {name if part == 'joint' else title} | {begun} "
                f"| {', '.join(f'{a:.2%}' for a in row['test_accuracy'])} | {row['seconds'] / 3600:.1f} "
                f"| {processor({**found, **row})} | {row['seed']} |"
            )
    where = found["environment"]
    return [
        *lines,
        "",
        f"One core, PyTorch {where['torch']}. Made by `python benchmarks/experiments/cifar_training.py b_alexnet "
        "--ship` and `b_resnet110 --ship`; settings and versions are in `benchmarks/results/cifar_training-*.json`.",
    ]


PAPER = {
    "trainings": trainings,
    "in_short": in_short,
    "earlier": earlier,
    "rivals": rivals,
    "table1": table_1,
    "held_back": held_back,
    "approximate": approximate,
}
