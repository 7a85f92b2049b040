"""The verbs of the command line, one per step. They parse options and call `branchynet.runs`."""

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
    TARGET_RUNTIMES,
    Accuracy,
    Confidence,
    Disagreement,
    Drop,
    DropOfPlain,
    ModelArgument,
    Plain,
    Quiet,
    RunArgument,
    Size,
    Split,
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
    help="Neural networks with early exits: train, choose thresholds, export.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # rich tables truncate words on a narrow terminal
    pretty_exceptions_enable=False,
)
out = Console(markup=False, emoji=False, highlight=False)  # names of files and classes may look like markup


@app.callback()
def _main(version: Version = False) -> None:
    """Neural networks with early exits: train, choose thresholds, export."""


@app.command()
@stoppable()
def demo(
    run: Annotated[Path, typer.Option(help="The run folder.", parser=path)] = Path("runs/demo"),
    data: Annotated[str, typer.Option(help="digits, mnist, fashion-mnist or folder:PATH (28 x 28 gray).")] = "digits",
    quiet: Quiet = False,
) -> None:
    """Run all steps on handwritten digits. This takes about a minute."""
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
        taps=("input", "pool1"),  # a cheap exit and an accurate one
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
    files = {"network with exits:": model, "report:": report, "trade-off curve:": made.path / "tradeoff.png"}
    out.print("", *(f"{name:<20}{path}" for name, path in files.items()), sep="\n", soft_wrap=True)


@app.command()
@stoppable()
def train(
    run: RunArgument,
    network: Annotated[
        str, named("{}; or module:function for your own network (installed or in the current folder).", *NETWORKS)
    ] = "b_lenet",
    data: Annotated[str, named("{}; or folder:PATH with one folder of images per class.", *DATA)] = "digits",
    size: Size = "",
    split: Split = "",
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Normalize each channel to mean 0 and standard deviation 1.")
    ] = False,
    warm_start_epochs: Annotated[int, typer.Option(help="Epochs of the plain network, trained first.")] = 10,
    epochs: Annotated[int, typer.Option(help="Epochs of joint training. You can raise them later.")] = 25,
    plain: Plain = True,
    branches_only: Annotated[bool, typer.Option(help="Train the branches only and freeze the backbone.")] = False,
    loss_weights: Annotated[str, typer.Option(help="Loss weight per exit, such as 1,0.3. Default: all 1.")] = "",
    distill: Annotated[float, typer.Option(help="Weight of distillation from the last exit.")] = 0.0,
    augment: Annotated[str, named("Augmentation of the training images: {}.", *AUGMENTS)] = "affine",
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 128,
    lr: Annotated[float, typer.Option(help="Highest learning rate of Adam.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and augmentation.")] = 0,
    mixed_precision: Annotated[str, named("Mixed precision: {}. fp16 needs a GPU.", "no", "bf16", "fp16")] = "no",
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the network first: a minute or more, then faster steps.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Train a network and its branches. Run the same command again to resume."""
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
        compile=compile,
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
    max_latency_us: Annotated[float | None, typer.Option(help="Largest mean microseconds per sample.")] = None,
    max_macs: Annotated[float | None, typer.Option(help="Largest mean multiply-accumulates per sample.")] = None,
    score: Annotated[str | None, named("Score of the exits: {}.", *SCORES)] = None,
    confidence: Confidence = 0.95,
    promise: Annotated[bool, typer.Option(help="Make the limit hold for unseen data, not just validation.")] = True,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Measure the cost of the stages again.")] = False,
    trust: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Choose thresholds on the validation data. The default limit is --max-drop 0.005."""
    from ..report.console import print_choice
    from ..runs.report import reason_run
    from ..runs.run import open_run
    from ..runs.steps import choose_run, measure_run

    limits = {"min_accuracy": min_accuracy, "max_disagreement": max_disagreement}
    limits |= {"max_latency_us": max_latency_us, "max_macs": max_macs}
    if max_drop is None and all(limit is None for limit in limits.values()):
        max_drop = 0.005
    found = open_run(run, trust=trust)
    how: Any = {"confidence": confidence if promise else None, "remeasure": remeasure, "progress": not quiet}
    choice = choose_run(found, max_drop=max_drop, **limits, score=score, **how)
    print_choice(out, choice, measure_run(found, choice.policy.score))
    if reason := reason_run(found, choice):
        out.print(reason, soft_wrap=True)


@app.command()
def bench(
    run: RunArgument,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,64",
    threads: Annotated[str, typer.Option(help="Numbers of threads, separated by commas.")] = "1",
    runtime: Annotated[str, named("Runtimes, separated by commas: {}.", *TARGET_RUNTIMES)] = "onnxruntime",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the rows to a file.", parser=path)
    ] = None,
    trust: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Time the exported file and the plain network.

    All work is included: branches, scores, decisions and moving samples. The runtimes torch and torch-cuda time a
    TorchEngine with the thresholds of the file.
    """
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
    batch: Annotated[int, typer.Option(help="Batch size to design for.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads per operator.")] = 1,
    runtime: Annotated[str, named("Runtime to design for: {}.", *TARGET_RUNTIMES, metavar="NAME")] = "onnxruntime",
    max_drop: DropOfPlain = 0.0,
    num_exits: Annotated[int, typer.Option(help="Largest number of exits, including the last.")] = 4,
    epochs: Annotated[int, typer.Option(help="Epochs to train all candidate branches; the backbone is frozen.")] = 3,
    final_epochs: Annotated[int, typer.Option(help="Extra epochs for the branches of the best designs.")] = 0,
    anyway: Annotated[bool, typer.Option(help="Train the design even if exits are not worth it.")] = False,
    trust: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Find the best places for early exits and train them. The design is also exported and timed."""
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
        out.print(f"run folder of the design: {folder}; report: {report}", soft_wrap=True)


@app.command()
def predict(
    model: ModelArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Image files or folders.", parser=path)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
) -> None:
    """Predict label, exit and score of image files."""
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
    model: ModelArgument, as_json: Annotated[bool, typer.Option("--json", help="Print the metadata as JSON.")] = False
) -> None:
    """Show inputs, exits, thresholds and metadata of a file."""
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
    threads: Annotated[int | None, typer.Option(help="Threads per operator.")] = None,
    runtime: Annotated[str, named("Runtime: {}.", *RUNTIMES, metavar="NAME")] = "onnxruntime",
) -> None:
    """Check the outputs of a file on this machine. The status is 1 if they differ from those stored in the file."""
    from ..deploy.loading import verify as compare
    from ..runs.predict import model_file

    found = compare(model_file(model), threads, runtime=cast(Any, runtime))
    out.print(f"{'right' if found.passed else 'WRONG'}: {found}", soft_wrap=True)
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def reproduce(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="table1, fig3, fig4 or all.")],
    output: Annotated[Path, typer.Option(help="Folder for tables and figures.", parser=path)] = Path("reproduced"),
    networks: Annotated[
        str, typer.Option(help="b_lenet, b_alexnet or b_resnet110, or several, separated by commas; or all.")
    ] = "all",
    from_nothing: Annotated[
        bool, typer.Option(help="Train the networks from scratch first. This takes hours and can be resumed.")
    ] = False,
    precision: Annotated[str, typer.Option(help="Precision of that training: no, bf16, or fp16 on a GPU.")] = "no",
) -> None:
    """Reproduce the paper's table and figures. Uses the shipped weights, or trains from scratch."""
    from ..reproduce import reproduce as make

    with stoppable() if from_nothing else contextlib.nullcontext():
        lines = make(what, output, networks=networks, from_nothing=from_nothing, precision=precision)
    out.print(*lines, f"tables and figures: {output}", sep="\n", soft_wrap=True)


@app.command()
def report(run: RunArgument, trust: Trust = False, quiet: Quiet = False) -> None:
    """Write one offline HTML page. It shows the trade-off curve, the exits, the timings and example images."""
    from ..runs.report import report_run
    from ..runs.run import open_run

    out.print(f"wrote {report_run(open_run(run, trust=trust), progress=not quiet)}", soft_wrap=True)
