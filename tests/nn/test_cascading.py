"""Cascades: independent networks as the exits of one."""

import copy

import numpy as np
import pytest
import torch

from branchynet import (
    BranchyNet,
    Policy,
    StagedEngine,
    Target,
    TorchEngine,
    attach,
    averaged,
    averaged_record,
    cascade,
    choose,
    detach,
    export,
    fit,
    load,
    measure,
    record,
    verify,
)
from branchynet.errors import InputError
from branchynet.graph.macs import exit_macs
from branchynet.graph.onnx_flat import flatten
from branchynet.nn.fingerprint import fingerprint
from branchynet.policy.record_scores import scores_of_record
from branchynet.policy.scores import agreement
from branchynet.profiling.onnx_parts import onnx_parts
from branchynet.profiling.parts import part_outputs
from helpers import score_oracles
from helpers.cascades import CASES, CLASSES, WIDTH, mlp, two_inputs
from helpers.loop import agree_in_batches, every_exit, figure_2, safe_thresholds


@pytest.mark.parametrize("build", CASES)
def test_files_and_engines_agree_with_the_naive_loop(build, tmp_path):
    net, x = build()
    outputs = every_exit(net, x)
    assert net.num_exits == outputs.shape[1]
    policy = Policy(thresholds=safe_thresholds(outputs, (0.3, 0.4, 0.5, 0.5)[: net.num_exits - 1]))
    nested = load(export(net, tmp_path / "net.onnx", policy=policy, example=x), threads=1)
    staged = load(export(net, tmp_path / "net", policy=policy, example=x, layout="stages"), threads=1)
    assert isinstance(staged, StagedEngine)
    engines = (nested, staged, TorchEngine(net, policy, x))
    for engine in engines:
        ordered = {name: x[name] for name in (i.name for i in engine.inputs)} if isinstance(x, dict) else x
        agree_in_batches(engine, net, ordered, policy.thresholds)
        if isinstance(x, dict):
            exits = [figure_2(sample, policy.thresholds)[0] for sample in outputs]
            assert engine(**{name: value.numpy() for name, value in x.items()}).exit.tolist() == exits
    assert verify(tmp_path / "net.onnx").passed and verify(tmp_path / "net").passed
    flat = load(export(net, tmp_path / "flat.onnx", policy=None, example=x), threads=1)
    arrays = {name: v.numpy() for name, v in x.items()} if isinstance(x, dict) else [v.numpy() for v in x]
    found = flat.outputs(**arrays) if isinstance(x, dict) else flat.outputs(*arrays)
    np.testing.assert_allclose(np.stack(found[1:], 1), outputs, atol=1e-4)


def test_inputs_have_the_names_of_the_last_network(tmp_path):
    net, x = two_inputs()
    for layout, name in (("nested", "net.onnx"), ("stages", "net")):
        path = export(net, tmp_path / name, policy=Policy(thresholds=(0.5, 0.5)), example=x, layout=layout)
        assert [i.name for i in load(path).inputs] == ["x", "extra"]
    assert [i.name for i in TorchEngine(net, Policy(thresholds=(0.5, 0.5)), x).inputs] == ["x", "extra"]


def test_a_stage_runs_one_network(tmp_path):
    net, x = two_inputs()
    policy = Policy(thresholds=(0.5, None))
    export(net, tmp_path / "net", policy=policy, example=x, layout="stages")
    engine = load(tmp_path / "net", threads=1)
    assert [stage.exit for stage in engine.stages] == [1, 3]
    for stage, width in zip(engine.stages, (2, 9), strict=True):
        assert sum(i.name in ("x", "extra") for i in stage.inputs) == 2, stage.inputs
        assert stage.macs == width * (WIDTH + 3 + CLASSES)


def test_the_plain_network_is_the_last_one():
    net, x = two_inputs()
    cost = measure(net, x, Target(batch_size=4), seconds=0.05)
    each = [width * (WIDTH + 3 + CLASSES) for width in (2, 5, 9)]
    assert cost.trunk_macs == (0, 0, each[2]) and cost.branch_macs == (*each[:2], 0)
    assert detach(net) is net.networks[-1] is net.backbone
    single = exit_macs(flatten(net.backbone, x, score=agreement))
    assert single[0] == (each[2],)


def test_the_timed_plain_network_is_the_last_one():
    net, x = two_inputs()
    for build in (lambda n: n, averaged):
        parts = onnx_parts(build(net), x, agreement, "float32", None)
        arrays = [v.numpy() for v in x]
        with parts.opened(part_outputs(parts), Target(batch_size=4)) as calls:
            np.testing.assert_allclose(calls["plain"](*arrays)[-1], net.backbone(*x).detach().numpy(), atol=1e-5)
        assert sum(parts.macs[0]) + sum(parts.macs[1]) == sum(width * (WIDTH + 3 + CLASSES) for width in (2, 5, 9))


@pytest.mark.filterwarnings("ignore:.*hardly more than")
def test_choose_takes_the_record_and_the_cost_of_a_cascade():
    net, x = two_inputs()
    with torch.no_grad():
        labels = net(*x)[-1].argmax(dim=1)
    cost = measure(net, x, Target(batch_size=4), seconds=0.05)
    made = record(net, [(x, labels)], progress=False)
    assert made.network == cost.network == fingerprint(net)
    choice = choose(made, cost, max_drop=0.3, confidence=None)
    assert choice.policy.num_exits == 3 and choice.outcome.samples == 64


def test_averaged_cascades_answer_as_a_committee(tmp_path):
    net, x = two_inputs()
    mean = averaged(net)
    p = torch.stack([o.softmax(dim=1) for o in net(*x)])
    for n, output in enumerate(mean(*x), 1):
        torch.testing.assert_close(output.exp(), p[:n].mean(dim=0))
    with pytest.raises(InputError, match="not averaged yet"):
        averaged(mean)
    labels = torch.randint(CLASSES, (64,))
    made = record(net, [(x, labels)], progress=False)
    assert averaged_record(made).network == fingerprint(mean)
    outputs = every_exit(mean, x)
    thresholds = safe_thresholds(outputs, (0.3, 0.4))
    path = export(mean, tmp_path / "net.onnx", policy=Policy(thresholds=thresholds), example=x)
    agree_in_batches(load(path, threads=1), mean, x, thresholds)


@pytest.mark.parametrize("last", [mlp, lambda width: attach(mlp(width), ["0"], example=torch.randn(2, WIDTH)).eval()])
def test_averaged_cascades_have_the_last_network_as_their_plain_one(last):
    net = averaged(cascade(mlp(2), last(9)))
    cost = measure(net, torch.randn(8, WIDTH), Target(batch_size=4), seconds=0.05)
    assert cost.num_exits == net.num_exits and cost.plain_us > 0


@pytest.mark.parametrize("never", [(1,), *(pytest.param(other, marks=pytest.mark.heavy) for other in ((), (1, 2)))])
def test_an_exit_answers_where_its_ensemble_agrees(never, tmp_path):
    """As in agreement-based cascades: with `never`, exit 1 or 2 only votes."""
    x = torch.randn(64, WIDTH)
    net = cascade(mlp(3), mlp(4), mlp(5), mlp(16))
    outputs = every_exit(net, (x,))
    made = record(net, [(x, torch.zeros(64, dtype=torch.int64))], progress=False)
    scores = np.array([[score_oracles.agreement(sample[:n]) for n in range(1, 5)] for sample in outputs])
    np.testing.assert_allclose(scores_of_record(made, "agreement"), scores, atol=1e-5)
    thresholds = tuple(None if n in never else t for n, t in enumerate((0.1, 0.2, 1 / 3), 1))
    policy = Policy("agreement", thresholds)
    passed = np.array([[t is not None and s < t for s, t in zip(row, thresholds, strict=False)] for row in scores])
    exits = np.where(passed.any(axis=1), passed.argmax(axis=1) + 1, 4)
    assert {3, 4} <= set(exits)
    files = [
        export(net, tmp_path / "nested.onnx", policy=policy, example=x),
        export(net, tmp_path / "batch_1.onnx", policy=policy, example=x, free="none"),
        export(net, tmp_path / "staged", policy=policy, example=x, layout="stages"),
    ]
    engines = [*(load(path, threads=1) for path in files), TorchEngine(net, policy, x)]
    if not never:
        engines.append(load(files[0], threads=1, runtime="openvino"))
    for engine in engines:
        answer = engine.answer_all(x.numpy()) if engine is engines[1] else engine(x.numpy())
        assert answer.exit.tolist() == exits.tolist()
        np.testing.assert_allclose(answer.score, scores[range(64), exits - 1], atol=1e-5)
        np.testing.assert_allclose(answer.output, outputs[range(64), exits - 1], atol=1e-4)
    at_three = exits == 3
    assert (outputs[at_three][:, :3].argmax(axis=2).std(axis=1) == 0).all()


@pytest.mark.filterwarnings("ignore:.*hardly more than")
def test_choose_and_measure_take_agreement():
    x = torch.randn(64, WIDTH)
    net = cascade(mlp(3), mlp(16), mlp(16))
    with torch.no_grad():
        labels = net(x)[-1].argmax(dim=1)
    cost = measure(net, x, Target(batch_size=4), score="agreement", seconds=0.05)
    choice = choose(record(net, [(x, labels)], progress=False), cost, max_drop=0.5, score="agreement", confidence=None)
    assert choice.policy.score == "agreement" and choice.outcome.accuracy >= 0.5


def test_networks_stay_as_they_are():
    networks = [mlp(2), mlp(9)]
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    net, x = cascade(*networks), torch.randn(8, WIDTH)
    torch.testing.assert_close(net(x), tuple(network(x) for network in networks))
    assert not net.training and net.networks == tuple(networks)
    for network, state in zip(networks, before, strict=True):
        assert list(network.state_dict()) == list(state)
    assert fingerprint(net) != fingerprint(cascade(*networks[::-1]))
    assert isinstance(net, BranchyNet) and list(copy.deepcopy(net)(x)[0].shape) == [8, CLASSES]


def test_a_cascade_in_a_cascade_and_in_a_branch():
    inner, x = cascade(mlp(2), mlp(3)), torch.randn(8, WIDTH)
    assert cascade(inner, mlp(9)).num_exits == len(cascade(inner, mlp(9))(x)) == 3
    tree = BranchyNet(mlp(9), {"input": inner}).eval()
    assert tree.num_exits == len(tree(x)) == 3


def test_a_reader_selects_one_exit_of_a_network_with_several():
    inner, x = cascade(mlp(2), mlp(3)), torch.randn(8, WIDTH)
    net = cascade(inner, mlp(9), output=[lambda exits: exits[1], None])
    assert net.num_exits == len(net(x)) == 2
    torch.testing.assert_close(net(x)[0], inner(x)[1])


def test_a_cascade_can_be_trained_further():
    net, x = cascade(mlp(2), mlp(9)), torch.randn(32, WIDTH)
    before = net(x)
    fit(net, [(x, torch.randint(CLASSES, (32,)))], epochs=1, progress=False)
    assert not any(torch.equal(a, b) for a, b in zip(before, net(x), strict=True))


def test_samples_that_selected_a_network_are_remembered():
    first, last = attach(mlp(2), ["0"], example=torch.randn(2, WIDTH)).eval(), mlp(9)
    first.selected_on = ("a", "b")
    last.selected_on = ("b", "c")
    assert cascade(first, last).selected_on == ("a", "b", "c")
