"""The command line: one verb a step, over run folders. Thin: the work is done elsewhere."""

import io
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from .errors import BranchyNetError, InputError, printable

app = typer.Typer(
    help="Deep networks that answer early when they are sure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(markup=False, emoji=False)  # names of files and classes are not ours

ENGINES = "onnxruntime, openvino, onnxruntime-cuda"
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")]
Trust = Annotated[bool, typer.Option(help="Run the function that a folder from elsewhere names as its network.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


@app.command()
def demo(
    run: Annotated[Path, typer.Option(help="Where to put the run.")] = Path("runs/demo"),
    data: Annotated[str, typer.Option(help="digits, mnist, fashion-mnist or folder:PATH (28 x 28 grey).")] = "digits",
    quiet: Quiet = False,
) -> None:
    """Train, choose, export, time and report, on real digits, in a minute."""
    from .runs import Settings, bench_run, choose_run, create_run, export_run, measure_run, train_run
    from .workbook import report_run

    settings = Settings(data=data, baseline_epochs=15, epochs=25, batch_size=64)
    made = create_run(run, settings)
    train_run(made, progress=not quiet)
    print_choice(choose_run(made, max_drop=0.005, confidence=None), measure_run(made))
    model = export_run(made)
    rows = bench_run(made, batches=(1, 64), threads=(1,), progress=not quiet)
    report = report_run(made)
    print_bench(rows)
    out.print(f"\nthe network, exits inside: {model}\nthe report:                {report}")


@app.command()
def train(
    run: RunArgument,
    network: Annotated[str, typer.Option(help="A zoo network, or package.module:function for your own.")] = "b_lenet",
    data: Annotated[str, typer.Option(help="digits, mnist, fashion-mnist, cifar10 or folder:PATH.")] = "digits",
    baseline_epochs: Annotated[int, typer.Option(help="Epochs of the plain network first: the warm start.")] = 10,
    epochs: Annotated[int, typer.Option(help="Epochs of all exits together.")] = 25,
    static: Annotated[bool, typer.Option(help="Also train the plain network on as long, to compare with.")] = True,
    branches_only: Annotated[bool, typer.Option(help="Leave the backbone exactly as it is.")] = False,
    weights: Annotated[str, typer.Option(help="A loss weight an exit, such as 1,0.3; all 1 by default.")] = "",
    distill: Annotated[float, typer.Option(help="How strongly the last exit teaches the earlier ones.")] = 0.0,
    augment: Annotated[str, typer.Option(help="none, shift, affine or flip-crop.")] = "affine",
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 128,
    rate: Annotated[float, typer.Option(help="Adam's step size at its highest.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = 0,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16, or fp16 on a GPU.")] = "no",
    quiet: Quiet = False,
) -> None:
    """Train a network and its branches; stopped and called again, it goes on where it was."""
    from .runs import Settings, create_run, train_run

    settings = Settings(
        network=network,
        data=data,
        baseline_epochs=baseline_epochs,
        epochs=epochs,
        static=static,
        train="branches" if branches_only else "all",
        weights=tuple(_numbers(weights, float)),
        distill=distill,
        augment=augment,
        batch_size=batch_size,
        rate=rate,
        seed=seed,
        mixed_precision=mixed_precision,
    )
    made = create_run(run, settings)
    train_run(made, progress=not quiet)
    out.print(f"trained; next: branchynet choose {run}")


@app.command()
def choose(
    run: RunArgument,
    max_drop: Annotated[float | None, typer.Option(help="Accuracy at most this far below the last exit's.")] = None,
    min_accuracy: Annotated[float | None, typer.Option(help="Accuracy at least this.")] = None,
    max_disagreement: Annotated[
        float | None, typer.Option(help="Another class than the last exit's for at most this share.")
    ] = None,
    max_latency_us: Annotated[float | None, typer.Option(help="Mean microseconds a sample at most this.")] = None,
    max_macs: Annotated[float | None, typer.Option(help="Mean multiply-accumulates a sample at most this.")] = None,
    score: Annotated[str | None, typer.Option(help="entropy, max_probability, margin, patience or learned.")] = None,
    confidence: Annotated[float, typer.Option(help="That a limit on accuracy holds for samples not seen.")] = 0.95,
    promise: Annotated[bool, typer.Option(help="Without one, the limit holds on the validation data alone.")] = True,
    trust: Trust = False,
) -> None:
    """Choose the thresholds on the validation data; by default at most 0.005 below the last exit."""
    from .runs import choose_run, measure_run, open_run

    limits = {
        "max_drop": max_drop,
        "min_accuracy": min_accuracy,
        "max_disagreement": max_disagreement,
        "max_latency_us": max_latency_us,
        "max_macs": max_macs,
    }
    if all(limit is None for limit in limits.values()):
        limits["max_drop"] = 0.005
    found = open_run(run, trust=trust)
    choice = choose_run(found, **limits, score=score, confidence=confidence if promise else None)
    print_choice(choice, measure_run(found, choice.policy.score))


@app.command()
def export(
    run: RunArgument,
    output: Annotated[Path | None, typer.Option(help="Where to write; RUN/model.onnx by default.")] = None,
    thresholds: Annotated[str, typer.Option(help="default: optional inputs; input: required inputs.")] = "default",
    batch: Annotated[str, typer.Option(help="dynamic, or 1 for a file that answers one sample at a time.")] = "dynamic",
    trust: Trust = False,
) -> None:
    """Write one ONNX file with the exits inside, checked against PyTorch."""
    from .runs import export_run, open_run

    size = 1 if batch == "1" else batch
    out.print(f"wrote {export_run(open_run(run, trust=trust), output, thresholds=thresholds, batch=size)}")


@app.command()
def bench(
    run: RunArgument,
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,64",
    threads: Annotated[str, typer.Option(help="Threads within an operator.")] = "1",
    engine: Annotated[str, typer.Option(help=f"Of {ENGINES}: one, or several with commas.")] = "onnxruntime",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows here.")] = None,
    trust: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Time the exported file beside the static network, everything inside the clock."""
    from .files import write_json
    from .runs import bench_run, open_run

    batches, counts = _numbers(batch, int), _numbers(threads, int)
    engines = [name.strip() for name in engine.split(",") if name.strip()]
    rows = bench_run(open_run(run, trust=trust), batches=batches, threads=counts, engines=engines, progress=not quiet)
    if json_file:
        write_json(json_file, rows)
    print_bench(rows)


@app.command()
def design(
    run: RunArgument,
    batch: Annotated[int, typer.Option(help="Samples a call: the best design depends on it.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads within an operator.")] = 1,
    runtime: Annotated[Any, typer.Option(metavar="NAME", help=f"What will run it: one of {ENGINES}.")] = "onnxruntime",
    max_drop: Annotated[float, typer.Option(help="Accuracy at most this far below the plain network's.")] = 0.0,
    exits: Annotated[int, typer.Option(help="The most exits, the network's own included.")] = 4,
    epochs: Annotated[int, typer.Option(help="Of all candidates together, on the frozen network.")] = 3,
    final_epochs: Annotated[int, typer.Option(help="More, of the candidates that the best designs have.")] = 0,
    anyway: Annotated[bool, typer.Option(help="Train the design even where exits are not worth it.")] = False,
    trust: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Find where early exits help a trained run's network; then train, export and time them beside the prediction."""
    from .designing import design_folder, design_run
    from .runs import open_run
    from .workbook import report_run

    advice, comparison = design_run(
        run, batch_size=batch, threads=threads, runtime=runtime, max_drop=max_drop, exits=exits,
        epochs=epochs, final_epochs=final_epochs, anyway=anyway, trust=trust, progress=not quiet,
    )  # fmt: skip
    print_advice(advice)
    if comparison is not None:
        out.print(str(comparison))
        folder = design_folder(run, batch, runtime)
        out.print(f"a run of its own: {folder}; the report: {report_run(open_run(folder, trust=trust))}")


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="A .onnx file that export wrote, or a run's folder.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Answer image files: label, exit and score of each."""
    from .engine.onnx import load
    from .workbook import predict_files

    engine = load(model / "model.onnx" if model.is_dir() else model)
    table = Table(Column("image", overflow="fold"), "label", "exit", "score")
    for answer in predict_files(engine, images):
        if as_json:
            print(json.dumps(answer))
        else:
            image, label = printable(answer["image"]), printable(answer["label"])
            table.add_row(image, label, str(answer["exit"]), f"{answer['score']:.4g}")
    if not as_json:
        out.print(table)


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="A .onnx file that export wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="The metadata as JSON.")] = False,
) -> None:
    """Show what a file holds: inputs, exits, thresholds, labels, preprocessing."""
    from .engine.onnx import load

    engine = load(model)
    if as_json:
        print(json.dumps(engine.metadata, indent=2))
        return
    table = Table(show_header=False, box=None)
    table.add_row("inputs", "\n".join(str(i) for i in engine.inputs))
    if engine.policy is None:
        table.add_row("exits", f"{engine.exits}, flat: none leaves early")
    else:
        told = [
            "never (left out)" if t is None else f"{engine.policy.score} < {t:.6g}" for t in engine.policy.thresholds
        ]
        table.add_row("exits", "\n".join(f"{n}: {t}" for n, t in enumerate([*told, "always"], 1)))
    for name in ("batch", "thresholds", "labels", "preprocessing", "promise", "version"):
        value = engine.metadata.get(name)
        if value not in (None, []):
            table.add_row(name, printable(", ".join(value) if name == "labels" else str(value)))
    out.print(table)


@app.command()
def reproduce(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="table1, fig3, fig4 or all.")],
    output: Annotated[Path, typer.Option(help="The folder for tables and pictures.")] = Path("reproduced"),
    networks: Annotated[str, typer.Option(help="Which of the paper's, with commas between; or all.")] = "all",
    from_nothing: Annotated[bool, typer.Option(help="Train them first: hours. Goes on where it was stopped.")] = False,
    precision: Annotated[str, typer.Option(help="Of that training: no, bf16, or fp16 on a GPU.")] = "no",
) -> None:
    """Make the paper's Table I, Figure 3 and Figure 4 again, from shipped weights or from nothing."""
    from .reproduce import reproduce as make

    lines = make(what, output, networks=networks, from_nothing=from_nothing, precision=precision)
    out.print(*lines, f"the tables and pictures: {output}", sep="\n")


@app.command()
def report(run: RunArgument, trust: Trust = False) -> None:
    """Write one offline HTML page: the trade-off curve, who leaves where, which images left first and last."""
    from .runs import open_run
    from .workbook import report_run

    out.print(f"wrote {report_run(open_run(run, trust=trust))}")


def print_choice(choice: Any, cost: Any) -> None:
    """The chosen thresholds, what they do on the validation data and cost, and what is promised of other data."""
    outcome = choice.outcome
    table = Table("exit", "leaves when", "share", "accuracy there", "us", title="chosen on validation")
    rules = ["never" if t is None else f"{choice.policy.score} < {t:.4g}" for t in choice.policy.thresholds]
    each = cost.latency_us(choice.policy.enabled)
    rows = zip([*rules, "always"], outcome.exit_share, outcome.exit_accuracy, each, strict=True)
    for n, (rule, share, accuracy, us) in enumerate(rows, 1):
        table.add_row(str(n), rule, f"{share:.1%}", "" if accuracy is None else f"{accuracy:.2%}", f"{us:.1f}")
    out.print(table)
    out.print(f"accuracy {outcome.accuracy:.2%}, last exit alone {outcome.last_accuracy:.2%}")
    out.print(
        f"a sample costs {outcome.mean_us:.1f} us in the mean, {outcome.p95_us:.1f} us at the 95th percentile, "
        f"{outcome.worst_us:.1f} us at worst"
    )
    if cost.plain_us is not None:
        speed = cost.plain_us / outcome.mean_us
        out.print(f"{speed:.2f}x the speed of the network without exits, {cost.plain_us:.1f} us")
    if choice.promise is not None:
        out.print(str(choice.promise))
    elif {"max_drop", "min_accuracy", "max_disagreement"} & choice.constraint.keys():
        out.print(f"no promise for other data: chosen on {outcome.samples} samples as they are")


def print_advice(advice: Any) -> None:
    """The best design of each number of exits, and what is advised."""
    table = Table("exits", "early exits", "us", "95 %", "speed-up", "at best", "accuracy", title="predicted")
    for design in advice.designs:
        low, high = design.interval_us
        exits = ", ".join(f"{head} at {tap}" for tap, head in zip(design.taps, design.heads, strict=True))
        table.add_row(
            str(len(design.exit_share)), exits or "none", f"{design.us:.1f}", f"{low:.1f}-{high:.1f}",
            f"{advice.static_us / design.us:.2f}x", f"{advice.static_us / design.oracle_us:.2f}x",
            f"{design.accuracy:.2%}",
        )  # fmt: skip
    out.print(table)
    out.print(str(advice))


def print_bench(rows: list[dict[str, Any]]) -> None:
    """Static, branchy and limit, one below the other, for each batch size."""
    table = Table(title="microseconds a sample, everything timed; accuracy on test images")
    for name in ("engine", "network", "us", "speed-up", "accuracy", "leave at exit 1, 2, …"):
        table.add_column(name, justify="left" if name in ("engine", "network") else "right")
    for row in rows:
        shares = ", ".join(f"{share:.1%}" for share in row["exit_share"])
        lines = [
            ("static", row["static_us"], row["accuracy_static"], ""),
            (row["network"], row["branchy_us"], row["accuracy_branchy"], shares),
            ("limit", row["limit_us"], row["accuracy_branchy"], f"overhead {row['overhead']:.2f}"),
        ]
        threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
        for where, (name, us, accuracy, note) in zip(
            (row["engine"], f"batch {row['batch']}", threads), lines, strict=True
        ):
            table.add_row(where, name, f"{us:.1f}", f"{row['static_us'] / us:.2f}x", f"{accuracy:.2%}", note)
        table.add_section()
    out.print(table)


def main() -> None:
    """Run the command line; an error of ours is one line on standard error and exit status 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names may hold what the terminal's encoding has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except BranchyNetError as error:
        told = "error: " + "\n".join(map(printable, str(error).splitlines()))
        Console(stderr=True).print(told, style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _numbers(text: str, kind: Any) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InputError(f"{text!r} is no list of numbers; write them as 1,64") from error


if __name__ == "__main__":
    main()
