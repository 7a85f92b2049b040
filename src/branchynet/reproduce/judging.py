"""One network of the paper, judged: accuracy on test images, thresholds from validation, everything timed."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
from ..policy.exit_record import ExitRecord
from ..policy.values import ExitCost, Outcome, Policy, thresholds_text
from ..profiling.benchmark import bench
from ..profiling.clock import in_turns
from ..profiling.cost import measure
from ..profiling.recording import record
from .recipes import Recipe, TrainedNetwork

AVERAGED = "max_probability"
"""The score of averaged answers: it costs less than entropy and parts right answers from wrong at least as well."""

_RECORDED = 250  # images a call
_WARM = 8
_PASSES = 5


@dataclass(frozen=True)
class PlainResult:
    """A plain network beside ours: accuracy on test images, and microseconds a sample at batch 1."""

    name: str
    accuracy: float
    us: float


@dataclass(frozen=True)
class OperatingPoint:
    """A network at one choice of thresholds.

    Attributes:
        name: the network's, and how it answers.
        asked: the accuracy on validation images that thresholds had to reach, such as the plain network's.
        reached: whether any do; else they are the most accurate ones.
        policy: score and thresholds.
        outcome: on test images, with costs.
        bench: the row of `bench` at batch 1, ONNX Runtime.
        cuda: the row of `on_device`, where there is a GPU.
    """

    name: str
    asked: float
    reached: bool
    policy: Policy
    outcome: Outcome
    bench: dict[str, Any]
    cuda: dict[str, float] | None


@dataclass(frozen=True)
class NetworkResult:
    """A recipe's networks, judged.

    Attributes:
        recipe: of which.
        val, test: records of the network with branches.
        cost: of its stages at batch 1 on one thread, ONNX Runtime.
        plain: the plain network.
        plain_val: its accuracy on validation images.
        smaller: smaller plain networks.
        points: answering by the published rule, at thresholds that keep the plain network's accuracy on validation
            images, then with each of the recipe's slacks; then likewise with answers averaged over the exits passed and
            the score of `AVERAGED`.
    """

    recipe: Recipe
    val: ExitRecord
    test: ExitRecord
    cost: ExitCost
    plain: PlainResult
    plain_val: float
    smaller: tuple[PlainResult, ...]
    points: tuple[OperatingPoint, ...]


def judge_network(
    recipe: Recipe, nets: TrainedNetwork, data: ImageData, *, samples: int, repeats: int, say: Callable[[str], None]
) -> NetworkResult:
    """Record, choose, export and time the networks of one recipe, on one thread at batch 1.

    Args:
        recipe: whose.
        nets: its networks, trained.
        data: their images.
        samples: how many test images are timed; all count for accuracy.
        repeats: passes over these.
        say: called with a line now and then.
    """
    say(f"{recipe.title}: recording {len(data.val) + len(data.test)} images")
    val, test = (_recorded(nets.branchy, split) for split in (data.val, data.test))
    plain_val, plain_test = (_accuracy(nets.plain, split) for split in (data.val, data.test))
    images = data.test.images.float() / 255
    # Five weights at most, fitted on the images that thresholds are chosen on; test images know nothing of either.
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
            say(f"{title}: measuring what each exit costs")
            costs[title] = cost = measure(net, images[:8], score=score, seconds=20.0)
            for slack in (0.0, *recipe.slack):
                asked = plain_val - slack
                choice, reached = nearest_to(on_val, cost, asked, score)
                policy = choice.policy
                say(f"{title}: timing thresholds {thresholds_text(policy.thresholds)}")
                path = export(net, folder / "model.onnx", policy=policy, example=images[:8], batch=1)
                (row,) = bench(
                    path, net, (images, data.test.labels), samples=samples, repeats=repeats,
                    about={"network": recipe.name, "plain_accuracy": plain_test},
                )  # fmt: skip
                cuda = (
                    on_device(nets.plain, net, policy, images[:samples], "cuda") if torch.cuda.is_available() else None
                )
                points.append(OperatingPoint(title, asked, reached, policy, evaluate(on_test, policy, cost), row, cuda))
        say(f"{recipe.title}: timing {len(nets.smaller)} smaller networks")
        plains = {recipe.plain_title: nets.plain, **nets.smaller}
        us = _side_by_side(plains, images[:samples], repeats, folder)
    # The plain network's time is that of the table's row, so that its neighbours are told by ratios taken in turns.
    scale = points[0].bench["plain_us"] / us[recipe.plain_title]
    smaller = tuple(PlainResult(n, _accuracy(net, data.test), us[n] * scale) for n, net in nets.smaller.items())
    plain = PlainResult(recipe.plain_title, plain_test, points[0].bench["plain_us"])
    return NetworkResult(recipe, val, test, costs[recipe.title], plain, plain_val, smaller, tuple(points))


def on_device(
    plain: nn.Module, branchy: nn.Module, policy: Policy, images: torch.Tensor, device: str
) -> dict[str, float]:
    """Milliseconds a sample at batch 1 of both networks in the PyTorch engine on a device, in turns.

    Answers come back to the host each time, so that nothing is left running when the clock stops.
    """
    example = images[:_WARM]
    engines = {
        "plain": TorchEngine(plain, Policy(), example, device=device),
        "branchy": TorchEngine(branchy, policy, example, device=device),
    }
    rows = [(image,) for image in images.to(device).split(1)]
    us = in_turns(engines, rows, _PASSES)
    for net in (plain, branchy):
        net.cpu()
    plain_ms, branchy_ms = us["plain"] / 1e3, us["branchy"] / 1e3
    return {"plain_ms": plain_ms, "branchy_ms": branchy_ms, "gain": plain_ms / branchy_ms}


def _recorded(net: nn.Module, split: Split) -> ExitRecord:
    return record(net, loader(split, _RECORDED), progress=True)


def _accuracy(net: nn.Module, split: Split) -> float:
    return evaluate(_recorded(net, split), Policy()).accuracy


def _side_by_side(nets: dict[str, nn.Module], images: torch.Tensor, repeats: int, folder: Path) -> dict[str, float]:
    """Median microseconds a sample of each plain network."""
    engines: dict[str, Engine] = {}
    for n, (name, net) in enumerate(nets.items()):
        path = export(net, folder / f"plain-{n}.onnx", policy=None, example=images[:8], batch=1)
        engines[name] = load(path, threads=1)
    rows: Sequence[tuple[Any]] = [(np.ascontiguousarray(image),) for image in images.split(1)]
    return in_turns({name: engine.outputs for name, engine in engines.items()}, rows, repeats)
