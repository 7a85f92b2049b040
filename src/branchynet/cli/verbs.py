"""The command line: one verb per step, over run folders. Thin: the work is done elsewhere."""

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from ..errors import BranchyNetError
from .options import (
    AUGMENTS,
    DATA,
    NETWORKS,
    RUNTIMES,
    SCORES,
    Accuracy,
    Disagreement,
    Drop,
    DropOfPlain,
    ModelArgument,
    Plain,
    Quiet,
    RunArgument,
    Size,
    Split,
    Thresholds,
    Trust,
    Version,
    image_size,
    named,
    numbers,
    path,
    shares,
    stoppable,
)

app = typer.Typer(
    help="Deep networks that answer early when they are sure.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # tables would cut words on a narrow terminal
    pretty_exceptions_enable=False,
)
out = Console(markup=False, emoji=False, highlight=False)  # names of files and classes are not ours


@app.callback()
def _main(version: Version = False) -> None:
    """Deep networks that answer early when they are sure."""


@app.command()
@stoppable()
def demo(
    run: Annotated[Path, typer.Option(help="Where to put the run.", parser=path)] = Path("runs/demo"),
    data: Annotated[str, typer.Option(help="digits, mnist, fashion-mnist or folder:PATH (28 x 28 grey).")] = "digits",
    quiet: Quiet = False,
) -> None:
    """Train, choose, export, time and report on real digits. It takes about a minute."""
    from ..report.console import print_bench, print_choice
    from ..runs.report import report_run
    from ..runs.run import create_run
    from ..runs.settings import Settings
    from ..runs.steps import bench_run, choose_run, export_run, measure_run, train_run

    settings = Settings(
        data=data,
        warm_start_epochs=15,
        epochs=25,
        batch_size=64,
        taps=("input", "pool1"),  # a cheap exit and a good one, between which there is something to choose
        branches=("linear", "hidden-64"),
    )
    made = create_run(run, settings)
    train_run(made, progress=not quiet)
    choice = choose_run(made, max_drop=0.005, confidence=None, progress=not quiet)
    print_choice(out, choice, measure_run(made))
    model = export_run(made, progress=not quiet)
    rows, _ = bench_run(made, batches=(1, 64), threads=(1,), progress=not quiet)
    report = report_run(made, progress=not quiet)
    print_bench(out, rows)
    told = {"the network, exits inside": model, "the report": report, "its picture": made.path / "tradeoff.png"}
    out.print("", *(f"{what + ':':<27}{path}" for what, path in told.items()), sep="\n", soft_wrap=True)


@app.command()
@stoppable()
def train(
    run: RunArgument,
    network: Annotated[
        str, named("{}; or your own, as module:function, from the current folder or installed.", *NETWORKS)
    ] = "b_lenet",
    data: Annotated[str, named("{}, or folder:PATH with a folder of images for each class.", *DATA)] = "digits",
    size: Size = "",
    split: Split = "",
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Bring each channel to mean 0 and deviation 1; predict does the same.")
    ] = False,
    warm_start_epochs: Annotated[int, typer.Option(help="Epochs of the plain network first: the warm start.")] = 10,
    epochs: Annotated[int, typer.Option(help="Epochs of all exits together; a trained run takes more.")] = 25,
    plain: Plain = True,
    branches_only: Annotated[bool, typer.Option(help="Leave the backbone exactly as it is.")] = False,
    loss_weights: Annotated[str, typer.Option(help="One per exit, such as 1,0.3; all 1 by default.")] = "",
    distill: Annotated[float, typer.Option(help="How strongly the last exit teaches the earlier ones.")] = 0.0,
    augment: Annotated[str, named("How images are varied: {}.", *AUGMENTS)] = "affine",
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 128,
    lr: Annotated[float, typer.Option(help="Adam's highest learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = 0,
    mixed_precision: Annotated[str, named("{} (on a GPU).", "no", "bf16", "fp16")] = "no",
    quiet: Quiet = False,
) -> None:
    """Train a network and its branches. Stopped and called again, it goes on where it was."""
    from ..runs.report import after_training
    from ..runs.run import create_run
    from ..runs.settings import Settings
    from ..runs.steps import train_run

    settings = Settings(
        network=network,
        data=data,
        size=image_size(size),
        split=shares(split),
        normalize=normalize,
        warm_start_epochs=warm_start_epochs,
        epochs=epochs,
        plain=plain,
        train="branches" if branches_only else "all",
        loss_weights=tuple(numbers(loss_weights, float)),
        distill=distill,
        augment=augment,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        mixed_precision=mixed_precision,
    )
    made = create_run(run, settings)
    train_run(made, progress=not quiet)
    out.print(*after_training(made), sep="\n", soft_wrap=True)


@app.command()
def choose(
    run: RunArgument,
    max_drop: Drop = None,
    min_accuracy: Accuracy = None,
    max_disagreement: Disagreement = None,
    max_latency_us: Annotated[float | None, typer.Option(help="Mean microseconds a sample at most this.")] = None,
    max_macs: Annotated[float | None, typer.Option(help="Mean multiply-accumulates a sample at most this.")] = None,
    score: Annotated[str | None, named("What exits are judged by: {}.", *SCORES)] = None,
    confidence: Annotated[float, typer.Option(help="That a limit on accuracy holds for samples not seen.")] = 0.95,
    promise: Annotated[bool, typer.Option(help="Without one, the limit holds on the validation data alone.")] = True,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Measure what the stages cost again.")] = False,
    trust: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Choose thresholds on the validation data. By default accuracy is at most 0.005 below the last exit's."""
    from ..report.console import print_choice
    from ..runs.report import reason_run
    from ..runs.run import open_run
    from ..runs.steps import choose_run, measure_run

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
    how: Any = {"confidence": confidence if promise else None, "remeasure": remeasure, "progress": not quiet}
    choice = choose_run(found, **limits, score=score, **how)
    print_choice(out, choice, measure_run(found, choice.policy.score))
    if reason := reason_run(found, choice):
        out.print(reason, soft_wrap=True)


@app.command()
def export(
    run: RunArgument,
    output: Annotated[Path | None, typer.Option(help="Where to write; RUN/model.onnx by default.", parser=path)] = None,
    thresholds: Thresholds = "default",
    batch: Annotated[str, typer.Option(help="dynamic, or 1 for a file that answers one sample at a time.")] = "dynamic",
    trust: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Write one ONNX file with the exits inside. It is compared with PyTorch."""
    from ..runs.run import open_run
    from ..runs.steps import export_run

    size = 1 if batch == "1" else batch
    written = export_run(open_run(run, trust=trust), output, thresholds=thresholds, batch=size, progress=not quiet)
    out.print(f"wrote {written}", soft_wrap=True)


@app.command()
def bench(
    run: RunArgument,
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,64",
    threads: Annotated[str, typer.Option(help="Threads within an operator.")] = "1",
    runtime: Annotated[str, named("One or several of {}, with commas between.", *RUNTIMES)] = "onnxruntime",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows here.", parser=path)] = None,
    trust: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Time the exported file beside the plain network. Everything is inside the clock."""
    from ..files import write_json
    from ..report.console import print_bench
    from ..runs.report import bench_notes
    from ..runs.run import open_run
    from ..runs.steps import bench_run

    batches, counts = numbers(batch, int), numbers(threads, int)
    runtimes = [name.strip() for name in runtime.split(",") if name.strip()]
    found = open_run(run, trust=trust)
    rows, faults = bench_run(found, batches=batches, threads=counts, runtimes=runtimes, progress=not quiet)
    if json_file:
        write_json(json_file, rows)
    print_bench(out, rows, bench_notes(found))
    if faults:
        raise BranchyNetError("; ".join(f"not timed in {name}: {error}" for name, error in faults.items()))


@app.command()
@stoppable()
def design(
    run: RunArgument,
    batch: Annotated[int, typer.Option(help="Samples a call: the best design depends on it.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads within an operator.")] = 1,
    runtime: Annotated[str, named("What will run it: one of {}.", *RUNTIMES, metavar="NAME")] = "onnxruntime",
    max_drop: DropOfPlain = 0.0,
    num_exits: Annotated[int, typer.Option(help="The most exits, the network's own included.")] = 4,
    epochs: Annotated[int, typer.Option(help="Of all candidates together, on the frozen network.")] = 3,
    final_epochs: Annotated[int, typer.Option(help="More, of the candidates that the best designs have.")] = 0,
    anyway: Annotated[bool, typer.Option(help="Train the design even where exits are not worth it.")] = False,
    trust: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Find where early exits help, and build them. They are trained, exported and timed beside the prediction."""
    from ..profiling.target import Target
    from ..report.console import print_advice
    from ..runs.design import design_folder, design_run, next_steps
    from ..runs.report import report_run
    from ..runs.run import open_run

    target = Target(batch, threads, cast(Any, runtime))
    advice, comparison = design_run(
        open_run(run, trust=trust), target, max_drop=max_drop, num_exits=num_exits, epochs=epochs,
        final_epochs=final_epochs, anyway=anyway, progress=not quiet,
    )  # fmt: skip
    folder = design_folder(run, target)
    print_advice(out, advice, "" if advice.worth else next_steps(folder, num_exits, epochs, final_epochs))
    if comparison is not None:
        out.print(*filter(None, [str(comparison), open_run(run, trust=trust).settings.caveat]), sep="\n")
        report = report_run(open_run(folder, trust=trust), progress=not quiet)
        out.print(f"a run of its own: {folder}; the report: {report}", soft_wrap=True)


@app.command()
def predict(
    model: ModelArgument,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", parser=path)],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Answer image files: label, exit and score of each."""
    from ..deploy.loading import load
    from ..report.console import print_answers
    from ..runs.predict import image_files, model_file, predict_files

    answers, faults = [], []
    for answer in predict_files(load(model_file(model)), image_files(images)):
        if "error" in answer:
            faults.append(answer["error"])
        elif as_json:
            print(json.dumps(answer))
        else:
            answers.append(answer)
    print_answers(out, answers)
    if faults:
        raise BranchyNetError("; ".join(faults))


@app.command()
def inspect(
    model: ModelArgument, as_json: Annotated[bool, typer.Option("--json", help="The metadata as JSON.")] = False
) -> None:
    """Show what a file holds. Inputs, exits, thresholds, labels and preprocessing."""
    from ..deploy.loading import load
    from ..report.console import print_model
    from ..runs.predict import model_file

    engine = load(model_file(model))
    if as_json:
        print(json.dumps(engine.metadata, indent=2))
    else:
        print_model(out, engine)


@app.command()
def verify(
    model: ModelArgument,
    threads: Annotated[int | None, typer.Option(help="Threads within an operator.")] = None,
    runtime: Annotated[str, named("One of {}.", *RUNTIMES, metavar="NAME")] = "onnxruntime",
) -> None:
    """Check that a file answers rightly on this machine. It holds samples to compare; exit status 1 if not."""
    from ..deploy.loading import verify as compare
    from ..runs.predict import model_file

    found = compare(model_file(model), threads, runtime=cast(Any, runtime))
    out.print(f"{'right' if found.passed else 'WRONG'}: {found}", soft_wrap=True)
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def reproduce(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="table1, fig3, fig4 or all.")],
    output: Annotated[Path, typer.Option(help="The folder for tables and pictures.", parser=path)] = Path("reproduced"),
    networks: Annotated[str, typer.Option(help="Which of the paper's, with commas between; or all.")] = "all",
    from_nothing: Annotated[bool, typer.Option(help="Train them first: hours. Goes on where it was stopped.")] = False,
    precision: Annotated[str, typer.Option(help="Of that training: no, bf16, or fp16 on a GPU.")] = "no",
) -> None:
    """Make the paper's table and figures again. From shipped weights, or from nothing."""
    from ..reproduce import reproduce as make

    with stoppable() if from_nothing else contextlib.nullcontext():
        lines = make(what, output, networks=networks, from_nothing=from_nothing, precision=precision)
    out.print(*lines, f"the tables and pictures: {output}", sep="\n", soft_wrap=True)


@app.command()
def report(run: RunArgument, trust: Trust = False, quiet: Quiet = False) -> None:
    """Write one offline HTML page. The trade-off curve, who leaves where, which images left first and last."""
    from ..runs.report import report_run
    from ..runs.run import open_run

    out.print(f"wrote {report_run(open_run(run, trust=trust), progress=not quiet)}", soft_wrap=True)
