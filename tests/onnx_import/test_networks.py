"""Networks from ONNX files go through every verb like any other."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from branchynet import Policy, TorchEngine, attach, choose, detach, export, fit, from_onnx, load, measure, record, zoo
from helpers.loop import agree_in_batches, every_exit, safe_thresholds
from helpers.networks import build, chain, draw, last_linear, residual, spread_head, tokens, two_inputs
from helpers.onnx_nodes import runtime_answers
from helpers.onnx_sources import write

FAMILIES = (chain, residual, tokens, two_inputs)
# float32: PyTorch and ONNX Runtime round sums in another order; outputs are scaled to about 1.
ATOL = 1e-4


def answers(net, inputs):
    with torch.no_grad():
        return net.eval()(*inputs).numpy()


def check_equals_runtime(net, path, inputs):
    for rows in (1, 2, 7):
        some = tuple(one[:rows] for one in inputs)
        theirs = runtime_answers(path, {f"x{n}": one.numpy() for n, one in enumerate(some, 1)})[0]
        np.testing.assert_allclose(answers(net, some), theirs, atol=ATOL)


def plain_file(family, path, exporter="dynamo", **options):
    """(file, inputs) of a random network without branches, whose outputs differ between samples."""
    net, example = build(family, seed=3)
    return write(detach(net), example, path, exporter, **options), draw(example, 64, seed=3)


@pytest.mark.parametrize("exporter", ["dynamo", "script"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_a_file_equals_onnx_runtime(family, exporter, tmp_path):
    path, inputs = plain_file(family, tmp_path / "plain.onnx", exporter)
    net = from_onnx(path)
    check_equals_runtime(net, path, inputs)
    net(*inputs).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_older_operator_sets_equal_onnx_runtime(opset, tmp_path):
    path, inputs = plain_file(tokens, tmp_path / "plain.onnx", "script", opset=opset)
    check_equals_runtime(from_onnx(path), path, inputs)


@pytest.mark.parametrize(
    "family",
    [chain, *(pytest.param(other, marks=pytest.mark.heavy) for other in FAMILIES[1:])],
    ids=lambda f: f.__name__,
)
def test_engines_of_a_file_with_exits_agree_with_the_naive_loop(family, tmp_path):
    path, inputs = plain_file(family, tmp_path / "plain.onnx")
    net = attach(path, "auto", example=inputs, num_exits=3).eval()
    with torch.no_grad():
        for branch, output in zip(net.branches, net(*inputs), strict=False):
            spread_head(last_linear(branch), output)
    thresholds = safe_thresholds(every_exit(net, inputs), (0.4, 0.5))
    policy = Policy(thresholds=thresholds)
    file = export(net, tmp_path / "model.onnx", policy=policy, example=inputs)
    stages = export(net, tmp_path / "stages", policy=policy, example=inputs, layout="stages")
    for engine in (load(file, threads=1), load(stages, threads=1), TorchEngine(net, policy, inputs)):
        agree_in_batches(engine, net, inputs, thresholds)


@pytest.mark.parametrize("name", ["lenet", pytest.param("resnet", marks=pytest.mark.heavy)])
def test_a_flat_file_of_export_is_read(name, tmp_path):
    net = zoo.lenet(pretrained=True) if name == "lenet" else zoo.resnet(20)
    images = torch.rand(7, *((1, 28, 28) if name == "lenet" else (3, 32, 32)))
    path = export(net, tmp_path / "plain.onnx", policy=None, example=images)
    np.testing.assert_allclose(answers(from_onnx(path), (images,)), answers(net, (images,)), atol=ATOL)


def digits(rows, seed):
    """Images of bright or dark halves, and which half is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (rows,), generator=generator)
    images = torch.rand(rows, 3, 8, 8, generator=generator)
    images[:, :, :4] += labels[:, None, None, None]
    return DataLoader(TensorDataset(images, labels), batch_size=16)


def small_file(path):
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2)
    )
    return write(net, (torch.rand(2, 3, 8, 8),), path)


def test_training_reduces_the_loss_and_every_verb_works(tmp_path):
    train, val = digits(128, 0), digits(256, 1)
    images = next(iter(val))[0]
    net = attach(small_file(tmp_path / "plain.onnx"), ["relu"], example=images)
    before = {name: p.clone() for name, p in net.backbone.named_parameters()}
    history = fit(net, train, val, epochs=4, progress=False)
    assert history.last.train_loss < history.rows[0].train_loss
    assert all((p != before[name]).any() for name, p in net.backbone.named_parameters())
    choice = choose(record(net, val), measure(net, images, seconds=0.1), max_drop=0.5, confidence=None)
    file = export(net, tmp_path / "model.onnx", policy=choice, example=images)
    with torch.no_grad():
        outputs = [output.numpy() for output in net.eval()(images)]
    answer = load(file)(images.numpy())
    np.testing.assert_allclose(answer.output, [outputs[n - 1][row] for row, n in enumerate(answer.exit)], atol=ATOL)


def test_training_branches_alone_leaves_the_file_as_it_is(tmp_path):
    path = small_file(tmp_path / "plain.onnx")
    images = next(iter(digits(16, 0)))[0]
    net = attach(path, ["relu"], example=images)
    fit(net, digits(64, 0), digits(64, 1), epochs=1, train="branches", progress=False)
    np.testing.assert_array_equal(answers(detach(net), (images,)), answers(from_onnx(path), (images,)))
