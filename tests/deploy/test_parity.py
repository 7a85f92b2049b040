"""On random networks, evaluate and the exported file equal the paper's Figure 2 as a naive loop."""

import numpy as np
import onnx_ir as ir
import pytest

from branchynet import ExitRecord, Policy, evaluate, export, load
from branchynet.deploy.assembly import assemble
from branchynet.graph.onnx_flat import flatten
from branchynet.policy.scores import entropy
from helpers.loop import BATCHES, QUANTILES, agree, agree_everywhere, every_exit, figure_2, safe_thresholds
from helpers.networks import FAMILIES, build, chain, draw, residual, tree, two_inputs

CASES = [(family, seed) for family in FAMILIES for seed in (0, 1)]


@pytest.fixture(scope="module", params=CASES, ids=lambda p: f"{p[0].__name__}-{p[1]}")
def case(request, tmp_path_factory):
    """A random network, its file, 64 samples, and what every exit says of each."""
    family, seed = request.param
    net, example = build(family, seed)
    inputs = draw(example, 64, seed)
    outputs = every_exit(net, inputs)
    path = tmp_path_factory.mktemp("parity") / "model.onnx"
    thresholds = safe_thresholds(outputs, QUANTILES[1][: net.num_exits - 1])
    export(net, path, policy=Policy(thresholds=thresholds), example=inputs)
    return net, path, inputs, outputs, thresholds


@pytest.mark.parametrize("batch", BATCHES)
def test_file_agrees_with_the_loop_at_its_own_thresholds(case, batch):
    _, path, inputs, outputs, thresholds = case
    agree(load(path, threads=1)(*(i[:batch].numpy() for i in inputs)), outputs[:batch], thresholds)


def test_file_agrees_with_the_loop_at_any_thresholds_and_batch(case):
    _, path, inputs, outputs, _ = case
    agree_everywhere(load(path, threads=1), [i.numpy() for i in inputs], outputs)


def test_evaluate_agrees_with_the_loop(case):
    net, _, _, outputs, _ = case
    labels = np.random.default_rng(0).integers(outputs.shape[2], size=len(outputs))
    record = ExitRecord(outputs=outputs, labels=labels)
    for quantiles in QUANTILES:
        thresholds = safe_thresholds(outputs, quantiles[: net.num_exits - 1])
        expected = [figure_2(sample, thresholds) for sample in outputs]
        outcome = evaluate(record, Policy(thresholds=thresholds))
        share = [np.mean([n == k for n, _ in expected]) for k in range(1, net.num_exits + 1)]
        np.testing.assert_allclose(outcome.exit_share, share)
        right = [z.argmax() == label for (_, z), label in zip(expected, labels, strict=True)]
        assert outcome.accuracy == pytest.approx(np.mean(right))


def test_each_exit_can_be_left_out_and_thresholds_can_be_required(case, tmp_path):
    net, _, inputs, outputs, thresholds = case
    flat = flatten(net, inputs, score=entropy)
    for never in range(net.num_exits - 1):
        fewer = tuple(None if n == never else t for n, t in enumerate(thresholds))
        ir.save(assemble(flat, Policy(thresholds=fewer)), tmp_path / "fewer.onnx")
        agree(load(tmp_path / "fewer.onnx", threads=1)(*(i.numpy() for i in inputs)), outputs, fewer)
    ir.save(assemble(flat, Policy(thresholds=thresholds), thresholds="input"), tmp_path / "required.onnx")
    agree(load(tmp_path / "required.onnx", threads=1)(*(i.numpy() for i in inputs)), outputs, thresholds)


def test_a_file_for_one_sample_at_a_time(case, tmp_path):
    _, _, inputs, outputs, thresholds = case
    path = export(case[0], tmp_path / "one.onnx", policy=Policy(thresholds=thresholds), example=inputs, free="none")
    engine = load(path, threads=1)
    for row in range(16):
        agree(engine(*(i[row : row + 1].numpy() for i in inputs)), outputs[row : row + 1], thresholds)


@pytest.mark.parametrize("family", [chain, residual, two_inputs, tree])
def test_nan_never_leaves_early(family, tmp_path):
    net, example = build(family, 2)
    inputs = draw(example, 8, 2)
    always = (1e30,) * (net.num_exits - 1)
    path = export(net, tmp_path / "model.onnx", policy=Policy(thresholds=always), example=inputs)
    poisoned = [i.numpy().copy() for i in inputs]
    poisoned[0][3] = np.nan
    answer = load(path, threads=1)(*poisoned)
    assert answer.exit[3] == net.num_exits
    assert (np.delete(answer.exit, 3) == 1).all()
