"""Costs and benchmarks in PyTorch: parts against the network itself, and what Python and ONNX files have in common."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from branchynet import BranchyNet, ExitCost, Policy, Target, averaged, bench, export, load, measure
from branchynet.deploy.recorded_part import RecordedPart
from branchynet.deploy.recorder import Recorder
from branchynet.errors import FileError, GraphError, InputError
from branchynet.graph.macs import exit_macs
from branchynet.graph.torch_flat import torch_flatten
from branchynet.graph.torch_macs import torch_exit_macs
from branchynet.graph.torch_stages import uncut
from branchynet.policy.scores import entropy
from branchynet.profiling import network_parts as module
from branchynet.profiling.network_parts import device_name
from branchynet.profiling.parts import leaving_policies, part_outputs
from branchynet.profiling.torch_parts import torch_parts
from helpers.loop import entropy as entropy_of
from helpers.loop import every_exit, figure_2, safe_thresholds
from helpers.networks import FAMILIES, build, chain, draw, tokens, tree, two_inputs
from helpers.onnx_graphs import flat_lenet, flat_of, grey_images

TORCH = Target(4, runtime="torch")
CPU = Recorder(torch.device("cpu"))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_parts_compute_what_each_exit_of_the_network_computes(family):
    net, example = build(family, 0)
    inputs = draw(example, 9, 1)
    outputs = every_exit(net, inputs)
    parts = torch_parts(net, example, entropy, "float32", TORCH)
    arrays = [i.numpy() for i in inputs]
    with parts.opened(part_outputs(parts) | leaving_policies(net.num_exits), TORCH) as calls:
        for name, call in calls.items():
            n = int(name.partition("_")[2] or net.num_exits)
            label, second, *rest = call(*arrays)
            output = rest[-1] if name.startswith("leave") else second
            np.testing.assert_allclose(output, outputs[:, n - 1], atol=1e-4)  # sums of float32 in another order
            np.testing.assert_array_equal(label, output.argmax(axis=1))
            if name.startswith("leave"):
                assert second.tolist() == [n] * 9
            else:
                read = {"plain": [], "alone": [n], "upto": range(1, n + 1)}[name.partition("_")[0]]
                scores = [[entropy_of(sample[k - 1]) for sample in outputs] for k in read]
                np.testing.assert_allclose(np.array(rest), np.array(scores), atol=1e-4)


def test_the_plain_network_of_averaged_exits_has_no_branches():
    net, example = build(two_inputs, 0)
    parts = torch_parts(averaged(net), example, entropy, "float32", TORCH)
    arrays = [i.numpy() for i in example]
    with torch.no_grad(), parts.opened(part_outputs(parts), TORCH) as calls:
        np.testing.assert_allclose(calls["plain"](*arrays)[1], net(*example)[-1], atol=1e-5)
        np.testing.assert_allclose(calls["last"](*arrays)[1], averaged(net)(*example)[-1], atol=1e-5)


@pytest.mark.parametrize("family", [tokens, tree], ids=lambda f: f.__name__)
def test_multiply_accumulates_are_those_of_the_onnx_graph(family):
    net, example, flat = flat_of(family)
    trunk, branch = torch_exit_macs(torch_flatten(net, example, entropy), example)
    expected = exit_macs(flat)
    assert trunk == pytest.approx(expected[0]) and branch == pytest.approx(expected[1])


@pytest.mark.parametrize("batch", [1, 4])
def test_a_measurement_in_pytorch_has_the_shape_of_others(batch, tmp_path):
    net, example = build(tree, 0)
    before = torch.get_num_threads()
    cost = measure(net, example, Target(batch, runtime="torch"), seconds=0.0)
    assert torch.get_num_threads() == before
    assert cost.num_exits == net.num_exits and cost.batch_size == batch and cost.plain_us > 0
    assert (cost.latency_us([True] * net.num_exits) > 0).all() and sum(cost.trunk_us) > 0
    assert (cost.runtime, cost.device) == ("torch", device_name(TORCH)) and f"torch on {cost.device}" in str(cost)
    cost.save(tmp_path / "cost.json")
    assert ExitCost.load(tmp_path / "cost.json") == cost


@pytest.fixture(scope="module")
def lenet(tmp_path_factory):
    """(B-LeNet, inputs, their logits, thresholds, its file)."""
    net, _ = flat_lenet()
    images = grey_images(40) * torch.linspace(0.2, 9, 40).view(-1, 1, 1, 1)
    outputs = every_exit(net, (images,))
    thresholds = safe_thresholds(outputs, (0.5,))
    path = tmp_path_factory.mktemp("lenet") / "model.onnx"
    return net, images, outputs, thresholds, export(net, path, policy=Policy(thresholds=thresholds), example=images[:4])


def test_bench_times_an_engine_in_pytorch_with_the_policy_of_the_file(lenet):
    net, images, outputs, thresholds, path = lenet
    labels = torch.arange(40) % 10
    targets = [Target(n, runtime=name) for name in ("torch", "onnxruntime") for n in (1, 8)]
    rows = bench(path, net, (images, labels), targets, repeats=1, samples=16)
    found = [figure_2(sample, thresholds) for sample in outputs]
    right = np.mean([z.argmax() == label for (_, z), label in zip(found, labels.tolist(), strict=True)])
    share = np.mean([n == 1 for n, _ in found])
    assert 0.2 < share < 0.8
    assert [(row["runtime"], row["batch"]) for row in rows] == [(t.runtime, t.batch_size) for t in targets]
    for row in rows:
        assert row["exit_share"] == pytest.approx([share, 1 - share]) and row["thresholds"] == list(thresholds)
        assert row["accuracy_branchy"] == pytest.approx(right) and row["device"] == device_name(targets[0])
        assert min(row["plain_us"], row["branchy_us"], row["limit_us"]) > 0


def test_bench_reads_a_folder_of_stages(lenet, tmp_path):
    net, images, _, thresholds, path = lenet
    labels = torch.zeros(40, dtype=torch.int64)
    folder = export(net, tmp_path / "net", policy=Policy(thresholds=thresholds), example=images[:4], layout="stages")
    targets = [Target(8), Target(8, runtime="torch")]
    rows, (one,) = (bench(p, net, (images, labels), t, repeats=1) for p, t in ((folder, targets), (path, targets[0])))
    for row in rows:
        assert row["accuracy_branchy"] == one["accuracy_branchy"] and row["exit_share"] == one["exit_share"]
    with pytest.raises(FileError, match=r"there is no file .*nowhere"):
        bench(tmp_path / "nowhere", net, (images, labels))


def test_files_and_precisions_of_files_are_refused_in_pytorch(lenet):
    net, images, *_, path = lenet
    with pytest.raises(InputError, match=r"runtime='torch' opens none: use TorchEngine\(net, policy, example\)"):
        load(path, runtime="torch")
    with pytest.raises(InputError, match=r"TorchEngine\(net, policy, example, device='cuda'\)"):
        load(path, runtime="torch-cuda")
    with pytest.raises(InputError, match="precision='int8' is for files; with runtime='torch', give one of 'float32'"):
        measure(net, images, TORCH, precision="int8", calibration=[images])


def test_half_precision_is_timed_in_half_precision(lenet):
    net, images, outputs, *_ = lenet
    parts = torch_parts(net, images[:4], entropy, "bf16", TORCH)
    with parts.opened(part_outputs(parts) | leaving_policies(2), TORCH) as calls:
        found = {name: call(images.numpy()) for name, call in calls.items()}
    exact = outputs[:, 1]
    for output in (found["plain"][1], found["upto_2"][1], found["leave_2"].output):
        assert output.dtype == np.float32
        off = np.abs(output - exact).max() / np.abs(exact).max()
        assert 1e-5 < off < 0.1  # bf16 has 8 bits


@pytest.mark.parametrize("family", [two_inputs, tokens], ids=lambda f: f.__name__)
def test_recorded_parts_compute_what_others_compute(family):
    """On the CPU, a recording is a call."""
    net, example = build(family, 0)
    parts = torch_parts(net, example, entropy, "float32", TORCH)
    names, n = [node.name for node in parts.graph.inputs], net.num_exits
    recorded = RecordedPart(uncut(parts.graph, n, range(1, n + 1)), names, example, CPU)
    with parts.opened({"all": [f"output_{n}", *(f"score_{k}" for k in range(1, n + 1))]}, TORCH) as calls:
        for rows in (1, 5, 5, 3):
            arrays = [i.numpy() for i in draw(example, rows, rows)]
            one, other = recorded(*arrays), calls["all"](*arrays)
            assert len(one) == len(other) == n + 2
            for a, b in zip(one, other, strict=True):
                np.testing.assert_array_equal(a, b)
    first, second = (recorded(*(i.numpy() for i in draw(example, 5, seed)))[1] for seed in (1, 2))
    assert not np.array_equal(first, second)  # answers are no views of the memory that the next call uses


@pytest.mark.parametrize(("fits", "message"), [(10, "batch_size=8 fits"), (0, "nor for 1")])
def test_a_batch_that_does_not_fit_is_named_with_one_that_does(fits, message):
    net, example = build(chain, 0)
    parts = torch_parts(net, example, entropy, "float32", TORCH)
    stage = uncut(parts.graph, 1, [])

    def module(rows, *values, real=stage.module):
        if rows > fits:
            error = RuntimeError("the capture ended")  # which replaces the error that broke it
            error.__context__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            raise error
        return real(rows, *values)

    part = RecordedPart(replace(stage, module=module), [node.name for node in parts.graph.inputs], example, CPU)
    with pytest.raises(InputError, match=rf"memory on cpu for batch_size=32 \(the capture ended.*{message}"):
        part(*(i.numpy() for i in draw(example, 32, 0)))
    assert not fits or len(part(*(i.numpy() for i in draw(example, 8, 0)))[0]) == 8


TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"


@pytest.mark.parametrize("cause", ["Found no NVIDIA driver on your system", TOO_OLD])
def test_a_gpu_that_is_missing_or_too_old_is_named(lenet, monkeypatch, cause):
    net, images, *_, path = lenet
    labels, real = torch.zeros(40, dtype=torch.int64), torch.empty

    def empty(*size, device=None, **options):
        if device is not None and torch.device(device).type == "cuda":
            raise RuntimeError(cause)
        return real(*size, device=device, **options)

    monkeypatch.setattr(torch, "empty", empty)
    message = re.escape(
        f"runtime='torch-cuda' needs an NVIDIA GPU that PyTorch can use ({cause}); give runtime='torch'"
    )
    with pytest.raises(InputError, match=message):
        measure(net, images, Target(runtime="torch-cuda"))
    with pytest.raises(InputError, match=message):
        bench(path, net, (images, labels), Target(runtime="torch-cuda"))


def test_the_gpu_is_named_where_there_is_one(monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module.torch.cuda, "get_device_name", lambda: "NVIDIA Abacus")
    assert {device_name(Target(runtime=name)) for name in ("torch-cuda", "onnxruntime-cuda")} == {"NVIDIA Abacus"}
    assert device_name(TORCH) != "NVIDIA Abacus"


class Doubled(nn.Module):
    """Puts two rows per sample behind one another, so that rows cannot be picked after `first`."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.relu(self.first(x.reshape(-1, 6))).reshape(-1, 12))


def test_a_cut_that_is_impossible_is_named_without_an_engine():
    net = BranchyNet(
        Doubled().eval(), {"first": nn.Sequential(nn.Unflatten(0, (-1, 2)), nn.Flatten(), nn.Linear(12, 3))}
    )
    parts = torch_parts(net, torch.randn(4, 12), entropy, "float32", TORCH)
    with pytest.raises(GraphError, match="none of its dimensions is the batch alone"):
        parts.check_cut(Policy(thresholds=(0.5,)))
    parts.check_cut(Policy(thresholds=(None,)))


def test_measuring_leaves_the_network_as_it_is():
    net, example = build(chain, 0)
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    measure(net, example, TORCH, seconds=0.0)
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
