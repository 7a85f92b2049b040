"""Evaluation of one network of the paper: thresholds from validation images, accuracy on test images, time."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import ImageData, Split, loader
from ..deploy.engine import Engine
from ..deploy.exporting import export
from ..deploy.loading import load
from ..deploy.torch_engine import TorchEngine
from ..nn.averaging import averaged
from ..policy.averaging import averaged_record, fit_averaging
from ..policy.choosing import nearest_to
from ..policy.evaluation import evaluate
from ..policy.exit_cost import ExitCost
from ..policy.exit_record import ExitRecord
from ..policy.values import Outcome, Policy, thresholds_text
from ..profiling.benchmark import bench
from ..profiling.clock import in_turns
from ..profiling.cost import measure
from ..profiling.recording import record
from .recipes import Recipe, TrainedNetwork

AVERAGED = "max_probability"
"""The score of averaged outputs: it costs less than entropy and distinguishes right from wrong at least as well."""

_RECORDED = 250  # images per call
_PASSES = 5


@dataclass(frozen=True)
class PlainResult:
    """A plain network to compare with: accuracy on test images, and microseconds per sample at batch 1."""

    network: str
    accuracy: float
    us: float


@dataclass(frozen=True)
class OperatingPoint:
    """A network with one choice of thresholds."""

    name: str  # of the network and of its exit rule
    asked: float  # required accuracy on validation images, such as the plain network's
    reached: bool  # whether some thresholds reach it; otherwise the policy is the most accurate one
    policy: Policy
    outcome: Outcome  # on test images, with costs
    bench: dict[str, Any]  # the row of `bench` at batch 1 in ONNX Runtime
    cuda: dict[str, float] | None  # the result of `on_device`; None without a GPU


@dataclass(frozen=True)
class NetworkResult:
    """The results of the networks of one recipe.

    `points` holds, for the paper's exit rule, the thresholds that keep the plain network's validation accuracy and
    those with each slack of the recipe; then the same for outputs averaged over the exits so far, with the score
    `AVERAGED`.
    """

    recipe: Recipe
    val: ExitRecord  # of the network with branches
    test: ExitRecord
    cost: ExitCost  # of its stages at batch 1 on one thread in ONNX Runtime
    plain: PlainResult
    plain_val: float  # validation accuracy
    smaller: tuple[PlainResult, ...]
    points: tuple[OperatingPoint, ...]


def evaluate_network(
    recipe: Recipe, nets: TrainedNetwork, data: ImageData, *, samples: int, repeats: int, say: Callable[[str], None]
) -> NetworkResult:
    """Record, choose, export and time the networks of one recipe, on one thread at batch 1.

    `samples` test images are timed in `repeats` passes; accuracy is over all test images.
    """
    say(f"{recipe.title}: recording {len(data.val) + len(data.test)} images")
    val, test = (_recorded(nets.branchy, split) for split in (data.val, data.test))
    plain_val, plain_test = (_accuracy(nets.plain, split) for split in (data.val, data.test))
    images = data.test.images.float() / 255
    # Like the thresholds, these few weights are fitted on the validation images.
    weights = fit_averaging(val, of="logits")
    rules = {
        recipe.title: (nets.branchy, "entropy", val, test),
        f"{recipe.title}, averaged": (
            averaged(nets.branchy, weights, of="logits"), AVERAGED,
            *(averaged_record(found, weights, of="logits") for found in (val, test)),
        ),
    }  # fmt: skip
    costs, points = {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, (net, score, on_val, on_test) in rules.items():
            say(f"{title}: measuring the cost of each exit")
            costs[title] = cost = measure(net, images[:8], score=score, seconds=20.0)
            for slack in (0.0, *recipe.slack):
                asked = plain_val - slack
                choice, reached = nearest_to(on_val, cost, asked, score)
                policy = choice.policy
                say(f"{title}: timing thresholds {thresholds_text(policy.thresholds)}")
                path = export(net, folder / "model.onnx", policy=policy, example=images[:8], free="none")
                (row,) = bench(
                    path, net, (images, data.test.labels), samples=samples, repeats=repeats,
                    about={"network": recipe.name, "plain_accuracy": plain_test},
                )  # fmt: skip
                gpu = torch.cuda.is_available()
                cuda = on_device(nets.plain, net, policy, images[:samples], "cuda") if gpu else None
                points.append(OperatingPoint(title, asked, reached, policy, evaluate(on_test, policy, cost), row, cuda))
        say(f"{recipe.title}: timing {len(nets.smaller)} smaller networks")
        us = _side_by_side({"plain": nets.plain, **nets.smaller}, images[:samples], repeats, folder)
    # Scale the times to the plain network's time in the table; only their ratios were measured in turns.
    plain = PlainResult(recipe.plain_title, plain_test, points[0].bench["plain_us"])
    scale = plain.us / us["plain"]
    smaller = tuple(PlainResult(n, _accuracy(net, data.test), us[n] * scale) for n, net in nets.smaller.items())
    return NetworkResult(recipe, val, test, costs[recipe.title], plain, plain_val, smaller, tuple(points))


def on_device(
    plain: nn.Module, branchy: nn.Module, policy: Policy, images: torch.Tensor, device: str
) -> dict[str, float]:
    """Time both networks in turns in the PyTorch engine on a device: milliseconds per sample at batch 1.

    Each call copies its outputs to the host, so its work is complete when the clock stops.
    """
    nets = {"plain": (plain, Policy()), "branchy": (branchy, policy)}
    engines = {name: TorchEngine(net, rule, images[:8], device=device) for name, (net, rule) in nets.items()}
    us = in_turns(engines, [(image,) for image in images.to(device).split(1)], _PASSES)
    for net in (plain, branchy):
        net.cpu()
    return {"plain_ms": us["plain"] / 1e3, "branchy_ms": us["branchy"] / 1e3, "gain": us["plain"] / us["branchy"]}


def _recorded(net: nn.Module, split: Split) -> ExitRecord:
    return record(net, loader(split, _RECORDED), progress=True)


def _accuracy(net: nn.Module, split: Split) -> float:
    return evaluate(_recorded(net, split), Policy()).accuracy


def _side_by_side(nets: dict[str, nn.Module], images: torch.Tensor, repeats: int, folder: Path) -> dict[str, float]:
    """Median microseconds per sample of each plain network, timed in turns."""
    engines: dict[str, Engine] = {}
    for n, (name, net) in enumerate(nets.items()):
        path = export(net, folder / f"plain-{n}.onnx", policy=None, example=images[:8], free="none")
        engines[name] = load(path, threads=1)
    rows = [(image.numpy(),) for image in images.split(1)]
    return in_turns({name: engine.outputs for name, engine in engines.items()}, rows, repeats)
